"""What the benches compute, without the web."""

import math

import pytest
import torch

from gammabeta import reference
from gammabeta.errors import RunError
from gammabeta.lab.benches import channel, drawing, mates
from gammabeta.lab.benches.breakage import Breakage
from gammabeta.lab.benches.faults import FAULTS
from gammabeta.lab.benches.folding import Folded, ulps
from gammabeta.lab.benches.opened import norms, walk
from gammabeta.lab.benches.race import Race, Track, build, entering, percentiles
from gammabeta.lab.subject import Subject, open_subject

THREE = [[(0.3, 0.25), (0.5, 0.15), (0.65, 0.3), (0.5, 0.45), (0.68, 0.6), (0.6, 0.82), (0.3, 0.8)]]
ONE = [[(0.5, 0.1), (0.5, 0.9)]]


def test_the_opened_network_is_the_network(subject: Subject):
    x = subject.test.batch(slice(0, 32))[0]
    with torch.no_grad():
        sites, logits = walk(subject.model, x)
        torch.testing.assert_close(logits, subject.model(x), rtol=1e-4, atol=1e-4)
        _, by_batch = walk(subject.model, x, by_batch=True)
    assert [site.name for site in sites] == ["bn1", "bn2", "bn3"]
    assert sites[0].output.shape == (32, 20, 13, 13)
    assert (by_batch - logits).abs().max() > 1e-3


@pytest.mark.parametrize(("strokes", "digit"), [(THREE, "3"), (ONE, "1")])
def test_a_drawing_is_named(subject: Subject, strokes, digit):
    answer = drawing.answer(subject, drawing.on_paper(strokes))
    assert answer["label"] == digit
    assert math.isclose(sum(share for _, share in answer["shares"]), 1, abs_tol=1e-5)
    shapes = [[stage["shape"] for stage in layer["stages"]] for layer in answer["layers"]]
    assert shapes == [[[20, 26, 26]] * 3, [[50, 9, 9]] * 3, [[1, 2, 64]] * 3]


def test_twins_start_from_the_same_weights():
    with_norm, without = (build(Track(depth=3), batch_norm=norm) for norm in (True, False))
    for name in ("conv1", "conv2", "fc1", "fc2", "fc3", "out"):
        assert torch.equal(with_norm.get_submodule(name).weight, without.get_submodule(name).weight)
    other = build(Track(depth=3, seed=1), batch_norm=True)
    assert not torch.equal(other.conv1.weight, with_norm.conv1.weight)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_what_enters_the_activation_is_what_the_network_computes(activation):
    network = build(Track(activation=activation), batch_norm=True).train()
    x = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = entering(network, x)["fc1"]
        logits = network.out(
            {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation](last)
        )
        torch.testing.assert_close(logits, network(x), rtol=1e-4, atol=1e-4)


def test_percentiles_of_what_is_not_finite():
    assert percentiles(torch.arange(101.0)) == pytest.approx([15, 50, 85])
    assert percentiles(torch.tensor([1.0, float("nan")])) is None


def test_a_race_takes_the_same_steps_again(images):
    races = [Race(Track(batch=16), *images) for _ in range(2)]
    for race in races:
        for _ in range(4):
            race.step()
    first, second = (race.frame(0) for race in races)
    assert first["step"] == 4
    assert first["ribbons"] == second["ribbons"]
    assert [len(twin["losses"]) for twin in first["twins"].values()] == [4, 4]


# The other twin may overflow, too; on which processors it does is chance.
@pytest.mark.filterwarnings("ignore:a batch with non-finite statistics")
def test_a_race_that_diverges_says_so(images):
    race = Race(Track(rate=10.0, scale=5.0, batch=8), *images)
    for _ in range(40):
        race.step()
        if race.runners["without"].lost:
            break
    assert "Diverged" in race.runners["without"].lost


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_channel_is_carried_through_the_equations(subject: Subject, layer):
    found = channel.look(subject, channel.Lens(layer=layer, channel=3, batch=32))
    xhat, y = found["steps"][2], found["steps"][4]
    assert xhat["mean"] == pytest.approx(0, abs=1e-6)
    assert xhat["std"] == pytest.approx(math.sqrt(found["var"] / (found["var"] + found["eps"])), rel=1e-6)
    assert y["mean"] == pytest.approx(found["beta"], abs=1e-5)
    assert sum(y["counts"]) == found["count"]
    back = found["backward"]
    assert sum(back["shares"]) == pytest.approx(1, abs=1e-3)
    assert back["dx_sum"] == pytest.approx(0, abs=1e-6)


def test_the_gradient_from_above_is_that_of_the_network(subject: Subject):
    name, layer = norms(subject.model)[1]
    x, labels = subject.test.batch(slice(0, 16))
    sites, _ = walk(subject.model, x, by_batch=True)
    settings = (layer.weight, layer.bias, layer.eps)
    found = channel.upstream(subject, name, sites[1].before, settings, labels)
    y = sites[1].after.clone().requires_grad_()
    h = torch.relu(y)
    h = subject.model.fc1(subject.model.flat(torch.nn.functional.avg_pool2d(h, 2)))
    last = subject.model.bn3
    h = torch.relu(reference.batch_norm(h, None, None, last.weight, last.bias, training=True, eps=last.eps))
    torch.nn.functional.cross_entropy(subject.model.fc2(h), labels).backward()
    torch.testing.assert_close(found, y.grad, rtol=1e-4, atol=1e-7)


def test_settings_of_the_lens_replace_the_layers_own(subject: Subject):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = channel.look(subject, channel.Lens(layer=1, channel=5, gamma=2.0, beta=-1.0, eps=0.5, batch=16))
    assert (found["gamma"], found["beta"], found["eps"]) == (2.0, -1.0, 0.5)
    assert found["steps"][4]["mean"] == pytest.approx(-1, abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


@pytest.mark.parametrize("kind", ["mixed", "one"])
def test_companions_move_a_prediction_in_training_only(subject: Subject, kind):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    spread = mates.draw(subject, mates.Company(image=2, size=8, kind=kind, digit=4), draws=5, seed=0)
    training, evaluation = spread.deviations
    assert evaluation == 0
    assert training > 0.01
    assert not subject.model.training
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


def test_the_fold_changes_the_last_bits(subject: Subject):
    folded = Folded.of(subject)
    found = folded.difference(0, 64)
    assert found["largest"] < 1e-5 * max(1, found["size"])
    assert found["same_answers"] == 64
    for layer, features in enumerate((20, 50, 128)):
        weights = folded.weights(layer, 1)
        assert weights["channels"] == features
        assert weights["after"]["scale"] == pytest.approx(
            abs(weights["factor"]) * weights["before"]["scale"], 1e-5
        )
        assert weights["bias"][1] == pytest.approx(
            weights["beta"] + (weights["bias"][0] - weights["mean"]) * weights["factor"], abs=1e-5
        )


def test_units_in_the_last_place():
    one = torch.tensor([1.0, -1.0, 0.0, -0.0])
    up = torch.nextafter(one, torch.tensor(2.0))
    assert ulps(one, up).tolist() == [1, 1, 1, 1]


def checks_of(faults: frozenset[str], images, steps: int) -> tuple[set[str], Breakage]:
    breakage = Breakage(faults, *images)
    for _ in range(steps):
        breakage.step()
    breakage.judge()
    return {finding.check for finding in breakage.diagnose().at_least("warning")}, breakage


def test_a_healthy_training_has_no_finding(images):
    checks, breakage = checks_of(frozenset(), images, 120)
    assert checks == set()
    assert breakage.finished
    _, training, evaluation = breakage.curve[-1]
    assert min(training, evaluation) > 0.9


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.key)
def test_each_fault_is_named_by_the_doctor(fault, images):
    checks, breakage = checks_of(frozenset({fault.key}), images, 70)
    assert checks & set(fault.checks), checks
    told = breakage.mend()
    assert told["trouble"] is None
    if fault.key == "nan_batch":
        assert told["before"] < 0.6
        assert told["after"] > 0.8
    assert told["remains"] or fault.key == "nan_batch"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError):
        open_subject(tmp_path)
