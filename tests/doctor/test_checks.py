"""The checks' own arithmetic, on evidence made by hand, at both sides of each threshold."""

import pytest
import torch

from gammabeta.doctor.checks import CHECKS, run_checks
from gammabeta.doctor.checks.drift import predicted_shift
from gammabeta.doctor.checks.settings import misplaced_weight
from gammabeta.doctor.checks.updates import measured_share
from gammabeta.doctor.evidence import (
    Activity,
    BatchSize,
    Evidence,
    Gap,
    Layer,
    LoaderShape,
    Optimizer,
    Ranks,
    Surroundings,
)
from gammabeta.stats.moments import Moments


def layer(name: str = "bn", **changes) -> Layer:
    generator = torch.Generator().manual_seed(1)
    facts = {
        "name": name,
        "kind": "BatchNorm2d",
        "channels": 20,
        "eps": 1e-5,
        "momentum": 0.1,
        "training": False,
        "frozen": False,
        "frozen_class": False,
        "tracks": True,
        "synchronized": False,
        "mean": torch.randn(20, dtype=torch.float64, generator=generator),
        "var": torch.rand(20, dtype=torch.float64, generator=generator) + 0.5,
        "buffer_dtype": torch.float32,
        "updates": 1000,
        "weight": torch.ones(20, dtype=torch.float64),
        "bias": torch.zeros(20, dtype=torch.float64),
        "parameter_dtype": torch.float32,
        "affine_learns": True,
    }
    return Layer(**(facts | changes))


def fired(check: str, *layers: Layer, **evidence) -> list[str]:
    found = Evidence(list(layers), evidence.pop("surroundings", {}), **evidence)
    return [finding.severity for finding in CHECKS[check].function(found)]


def with_values(tensor: torch.Tensor, value: float, count: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[:count] = value
    return tensor


ONES = torch.ones(20, dtype=torch.float64)

CASES = [
    ("never-updated", {}, []),
    ("never-updated", {"mean": 0 * ONES, "var": ONES}, ["error"]),
    ("never-updated", {"updates": 0}, ["note"]),
    ("never-updated", {"mean": None, "var": None}, []),
    ("init-residue", {"updates": 44}, []),
    ("init-residue", {"updates": 43}, ["warning"]),
    ("init-residue", {"updates": 8}, ["warning"]),
    ("init-residue", {"updates": 8, "var": with_values(ONES, 0.4, 1)}, []),
    ("init-residue", {"updates": 60, "var": 5e-3 * ONES}, ["warning"]),
    ("init-residue", {"updates": 60, "var": 0.1 * ONES}, []),
    ("init-residue", {"updates": 5, "momentum": None}, []),
    ("invalid-statistics", {"var": with_values(ONES, float("nan"), 1)}, ["error"]),
    ("invalid-statistics", {"var": with_values(ONES, -1e-9, 1)}, ["error"]),
    ("invalid-statistics", {"mean": with_values(ONES, float("inf"), 1)}, ["error"]),
    ("collapsed-variance", {"var": with_values(ONES, 1e-6, 1)}, ["note"]),
    ("collapsed-variance", {"var": with_values(ONES, 1e-6, 2)}, ["warning"]),
    ("collapsed-variance", {"var": with_values(ONES, 2e-5, 2)}, []),
    ("exploding-variance", {"var": with_values(ONES, 65505.0, 1)}, ["warning"]),
    ("exploding-variance", {"var": with_values(1e-3 * ONES, 2e3, 1)}, ["warning"]),
    ("exploding-variance", {"var": with_values(ONES, 6e4, 1)}, []),
    ("dead-gamma", {"weight": with_values(ONES, 1e-4, 1)}, ["note"]),
    ("dead-gamma", {"weight": with_values(ONES, 1e-4, 2)}, ["warning"]),
    ("dead-gamma", {"weight": 0 * ONES}, ["warning"]),
    ("dead-gamma", {"weight": 0 * ONES, "updates": 9}, ["note"]),
    ("dead-gamma", {"weight": with_values(ONES, 1e-4, 2), "updates": 9}, ["warning"]),
    ("dead-gamma", {"weight": with_values(ONES, 0.01, 5)}, []),
    ("dead-gamma", {"bias": with_values(0 * ONES, -5, 20)}, []),  # no ReLU known to follow
    ("momentum", {"momentum": 0.89}, []),
    ("momentum", {"momentum": 0.9}, ["warning"]),
    ("momentum", {"momentum": 1.0}, ["warning"]),
    ("momentum", {"momentum": 0.0}, ["warning"]),
    ("momentum", {"momentum": 0.0, "frozen": True}, []),
    ("momentum", {"momentum": -0.1}, ["error"]),
    ("momentum", {"momentum": None}, []),
    ("eps", {"eps": 0.0}, ["error"]),
    ("eps", {"eps": 1e-8, "parameter_dtype": torch.float16}, ["error"]),
    ("eps", {"eps": 1e-8, "parameter_dtype": torch.bfloat16}, []),
    ("half-precision-buffers", {"buffer_dtype": torch.float16}, ["warning"]),
    ("half-precision-buffers", {"buffer_dtype": torch.float64}, []),
    ("tracking-toggled", {"tracks": False}, ["error"]),
    ("tracking-toggled", {"mean": None, "var": None}, ["warning"]),
    ("tracking-toggled", {"tracks": False, "mean": None, "var": None}, []),
    ("partly-frozen", {"training": True}, ["error"]),
]


@pytest.mark.parametrize(("check", "changes", "expected"), CASES)
def test_thresholds_from_the_layer_alone(check, changes, expected):
    assert fired(check, layer(**changes)) == expected


def test_findings_name_their_check_and_their_layer():
    without = layer("head", mean=None, var=None, tracks=False)
    layers = [layer("b.0"), layer("b.1"), layer("b.2", updates=500, eps=0.0), without]
    seen = run_checks(
        Evidence(
            layers,
            {},
            optimizer=Optimizer(None, {"b.0": ("weight",)}, 0.1),
            changed_in_eval=("b.1.running_mean",),
            batch_dependence=1.0,
            ranks=Ranks(2, ("b.1",)),
            batch_images=(8, 1),
        )
    )
    expected = {
        ("batch-dependence", "head"),
        ("eps", "b.2"),
        ("eps", ""),
        ("eval-mutates", "b.1"),
        ("last-batch-of-one", ""),
        ("rank-divergence", "b.1"),
        ("tiny-batch", ""),
        ("unequal-updates", "b.2"),
        ("weight-decay-on-affine", "b.0"),
        *(("unsynchronized-replicas", each.name) for each in layers),
    }
    assert {(finding.check, finding.layer) for finding in seen} == expected


def test_partly_frozen_in_a_model_in_training():
    def found(*layers: Layer) -> list[str]:
        return fired("partly-frozen", *layers, model_training=True)

    assert found(layer(training=True)) == []
    assert found(layer(training=True, affine_learns=False)) == ["warning"]
    assert found(layer("a", training=True), layer("b", training=False)) == ["warning"]
    assert found(layer("a", training=True), layer("b", training=False, affine_learns=False)) == []
    assert found(layer(training=False, frozen_class=True), layer(training=True)) == []


def test_relu_that_is_always_off_or_on():
    around = {"bn": Surroundings(relu_after=True)}
    off, on = (layer(bias=with_values(0 * ONES, value, 5)) for value in (-4.1, 4.1))
    assert fired("dead-gamma", off, surroundings=around) == ["warning"]
    assert fired("dead-gamma", on, surroundings=around) == ["note"]
    assert fired("dead-gamma", layer(bias=-3.9 * ONES), surroundings=around) == []


@pytest.mark.parametrize(
    ("steps", "calls", "expected"), [(500, 1, ["note"]), (500, 2, []), (1000, 1, []), (300, 1, [])]
)
def test_double_update_by_counting_is_a_note(steps, calls, expected):
    optimizer = Optimizer(steps, {}, 0.0)
    around = {"bn": Surroundings(calls=calls)}
    assert fired("double-update", layer(), optimizer=optimizer, surroundings=around) == expected
    assert (
        fired("double-update", layer(), optimizer=optimizer, surroundings=around, updated_in_backward=())
        == []
    )
    assert fired("double-update", layer(), updated_in_backward=("bn",)) == ["warning"]


def test_unequal_updates_within_and_between_parts():
    known = {name: Surroundings(calls=1) for name in ("b.0", "b.1", "b.2", "g.0", "g.1")}
    same = [layer("b.0"), layer("b.1"), layer("b.2")]
    assert fired("unequal-updates", *same, surroundings=known) == []
    odd = [*same[:2], layer("b.2", updates=500)]
    assert fired("unequal-updates", *odd, surroundings=known) == ["warning"]
    assert fired("unequal-updates", *odd) == ["note"]
    twice = {**known, "b.2": Surroundings(calls=2)}
    assert fired("unequal-updates", *same[:2], layer("b.2", updates=2000), surroundings=twice) == []
    parts = [*same, layer("g.0", updates=500), layer("g.1", updates=500)]
    assert fired("unequal-updates", *parts, surroundings=known) == ["note"]


def test_eps_of_the_source_framework():
    assert fired("eps", layer(), source="keras") == ["warning"]
    assert fired("eps", layer(eps=1e-3), source="keras") == []
    assert fired("eps", layer(), source="flax") == []
    assert fired("eps", layer("a"), layer("b", eps=1e-3)) == ["note"]


def test_momentum_none_over_uneven_batches():
    assert fired("momentum", layer(momentum=None), batch_images=(64,) * 20 + (32,)) == []
    assert fired("momentum", layer(momentum=None), batch_images=(64, 64, 2)) == ["warning"]
    assert misplaced_weight((64, 64)) == 0.0
    assert misplaced_weight((99, 1)) == pytest.approx(0.49)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (LoaderShape(129, 64, False), ["warning"]),
        (LoaderShape(129, 64, True), []),
        (LoaderShape(130, 64, False), []),
        (LoaderShape(1, 1, False), []),
        (LoaderShape(7, 1, False), []),
    ],
)
def test_last_batch_of_one(shape, expected):
    assert fired("last-batch-of-one", layer(kind="BatchNorm1d"), loader=shape) == expected
    assert fired("last-batch-of-one", layer(), loader=shape) == ["note"] * len(expected)
    assert fired("last-batch-of-one", layer(), batch_images=(1, 1, 1)) == []


def test_distributed():
    two = Ranks(2, ("bn",))
    assert fired("rank-divergence", layer(), ranks=two) == ["warning"]
    assert fired("unsynchronized-replicas", layer(), ranks=two) == ["note"]
    assert fired("unsynchronized-replicas", layer(), ranks=two, batch_images=(8, 8)) == ["warning"]
    assert fired("unsynchronized-replicas", layer(), ranks=two, batch_images=(16, 16)) == []
    assert fired("unsynchronized-replicas", layer(synchronized=True), ranks=two, batch_images=(8,)) == []
    assert fired("unsynchronized-replicas", layer(), batch_images=(8,)) == []


def activity(batch: torch.Tensor, batches: int = 20, size: int = 4) -> Activity:
    """What a layer saw of batches (values, C), each with another mean."""
    seen = Activity(batch.shape[1])
    for index in range(batches):
        moments = Moments.of_rows(batch.roll(16 * size * index, 0)[: 16 * size])
        seen.sizes[BatchSize(size, 16 * size)] += 1
        seen.population.pool(moments)
        seen.batch_means.pool(Moments.of_rows(moments.mean[None]))
        seen.batch_variances.pool(Moments.of_rows(moments.variance[None]))
        seen.largest = torch.maximum(seen.largest, moments.variance)
    return seen


def constant(channels: int, spread: float = 0.0) -> Activity:
    values = torch.randn(64, 20, dtype=torch.float64)
    values[:, :channels] *= spread
    return activity(values)


@pytest.mark.parametrize(
    ("seen", "facts", "around", "expected"),
    [
        (constant(0), {}, {}, []),
        (constant(1), {}, {}, ["note"]),
        (constant(2), {}, {}, ["warning"]),  # alive in training, and constant now
        (constant(2, 1e-3), {}, {}, ["note"]),  # less than eps, but it varies
        (constant(2), {}, {"of_data": True}, ["note"]),
        (constant(2), {"updates": 9, "var": with_values(ONES, 0.0, 2)}, {}, ["note"]),
        (constant(2), {"updates": 999, "var": with_values(ONES, 0.0, 2)}, {}, ["warning"]),
        (constant(2), {"updates": 9}, {}, ["warning"]),
        (constant(2), {"mean": None, "var": None}, {}, ["warning"]),
    ],
)
def test_dead_input(seen, facts, around, expected):
    given = {"surroundings": {"bn": Surroundings(**around)}, "activity": {"bn": seen}}
    assert fired("dead-input", layer(**facts), **given) == expected


def test_few_values_do_not_show_that_a_channel_is_dead():
    seen = activity(torch.zeros(16, 20, dtype=torch.float64), batches=5)
    assert fired("dead-input", layer(), activity={"bn": seen}) == ["note"]


def test_small_variances_that_the_data_has_too_are_right():
    low = layer(var=with_values(ONES, 1e-6, 4))
    assert fired("collapsed-variance", low) == ["warning"]
    assert fired("collapsed-variance", low, activity={"bn": constant(4, 1e-3)}) == []
    assert fired("collapsed-variance", low, activity={"bn": constant(0)}) == ["warning"]


def test_few_samples_with_many_independent_values_are_a_note():
    def found(values: torch.Tensor, **more) -> list[str]:
        return fired("tiny-batch", layer(), activity={"bn": activity(values, **more)}, batch_images=(4,) * 20)

    many = torch.randn(6400, 20, dtype=torch.float64)
    alike = many[:64].repeat_interleave(100, 0)
    assert found(many.repeat(2, 1), size=100) == ["note"]
    assert found(alike.repeat(2, 1), size=100) == ["warning"]
    assert found(many.repeat(2, 1), size=100, batches=7) == ["warning"]  # too few to tell


def gap(**changes) -> Gap:
    values = {"train": 1.0, "bn_train": 1.0, "population": 1.0, "evaluation": 1.0, "stale": (), "noise": ()}
    return Gap(**(values | {"output_change": 0.0, "output_noise": 0.0} | changes))


NOISE = {"population": 1.3, "evaluation": 1.3, "noise": (0.3, 0.29, 0.31), "stale": (0, 0, 0)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"train": 3.0}, []),  # dropout costs in training only
        ({"evaluation": 1.09, "stale": (0.09,) * 4}, []),
        ({"evaluation": 1.2, "stale": (0.19, 0.2, 0.21)}, ["warning"]),
        ({"evaluation": 1.2, "stale": (-0.5, 0.9, 0.2)}, []),
        ({"evaluation": 2.0, "stale": (0.99, 1.0, 1.01)}, ["error"]),
        ({"evaluation": 0.5, "stale": (-0.5, -0.5)}, []),
        ({"evaluation": float("nan")}, ["error"]),
        ({"bn_train": float("nan"), "evaluation": float("nan")}, []),
        ({"population": 1.2, "evaluation": 1.2, "noise": (0.2, 0.2), "stale": (0, 0)}, ["warning"]),
        ({"bn_train": None, "output_change": 0.09, "output_noise": 0.09}, []),
        ({"bn_train": None, "output_change": 0.2}, ["warning"]),
        ({"bn_train": None, "output_noise": 0.6}, ["error"]),
        # What batches of that size do by chance is a note.
        (NOISE | {"chance": (0.29, 0.3, 0.31), "by_size": 0.3}, ["note"]),
        (NOISE | {"chance": (0.05, 0.06, 0.04), "by_size": 0.05}, ["warning"]),
        (NOISE | {"chance": (0.3, 0.3), "by_size": 0.0}, ["warning"]),
        (NOISE | {"chance": (-0.1, 0.5), "by_size": 0.15}, ["note"]),
        # Two domains, of which one has all the noise.
        (NOISE | {"noise": (0.0, 0.6) * 8, "chance": (0.0, 0.1, 0.05, 0.05), "by_size": 0.05}, ["warning"]),
        ({"bn_train": None, "output_noise": 0.6, "by_size": 0.4}, ["note"]),
        ({"bn_train": None, "output_noise": 0.6, "by_size": 0.2}, ["error"]),
        # The rest of training that is better than evaluation.
        ({"train": 0.5, "elsewhere": (0.5, 0.5)}, ["error"]),
        ({"train": 0.95, "elsewhere": (0.05, 0.05)}, []),
    ],
)
def test_train_eval_gap(changes, expected):
    assert fired("train-eval-gap", layer(), gap=gap(**changes)) == expected


def test_gap_is_attributed_to_its_larger_part():
    evidence = Evidence(
        [layer()], {}, gap=gap(population=1.1, evaluation=1.5, stale=(0.4, 0.4), noise=(0.1, 0.1))
    )
    (finding,) = CHECKS["train-eval-gap"].function(evidence)
    assert finding.values["part"] == "stale"
    assert "recalibrate" in finding.fix


def test_shift_predicted_from_the_statistics_behind_a_dropout():
    x = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor(
        [0.0, 1.0, -2.0]
    )
    p = 0.3
    dropped = x * (torch.rand_like(x) > p) / (1 - p)
    behind = layer(mean=dropped.mean(0), var=dropped.var(0), channels=3)
    assert predicted_shift(behind, p) == pytest.approx(float((dropped.var(0) / x.var(0)).median()), rel=0.02)
    around = {"bn": Surroundings(dropout=p, dropout_direct=True)}
    assert fired("dropout-before-bn", behind, surroundings=around) == ["warning"]
    assert fired("dropout-before-bn", behind, surroundings={"bn": Surroundings(dropout=p)}) == ["note"]
    assert fired("dropout-before-bn", behind) == []


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_share_of_the_start_is_measured(share):
    population = Moments(1000, 3 * ONES, 1000 * 5.0 * ONES)
    true = population.unbiased_variance
    found = measured_share((1 - share) * population.mean, (1 - share) * true + share, population)
    assert found == pytest.approx(share, abs=1e-12)
