"""Statistics merged from several copies, kept at home, adapted to another domain, and kept side by side."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gammabeta as gb
from gammabeta.errors import NotFiniteError, SurgeryError, UsageError


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )


def images(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * (1 + shift) + 5 * shift
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(-3, 3))
def test_counts_pool_to_the_statistics_of_the_union(sizes, shift):
    sets = [images(n, seed, shift * seed).double() for seed, n in enumerate(sizes)]
    model = nn.BatchNorm2d(3).double()
    clients = [gb.recalibrate(copy.deepcopy(model), [data]) for data in sets]
    merged = gb.merge_statistics(clients, counts=[n * 36 for n in sizes])
    whole = gb.recalibrate(copy.deepcopy(model), [torch.cat(sets)]).state_dict()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(merged[name], whole[name], rtol=1e-12, atol=1e-12)
    assert int(merged["num_batches_tracked"]) == len(sizes)


def test_counts_may_differ_from_layer_to_layer():
    model = small()
    parts = [images(4, 1), images(12, 2, 1.0)]
    clients = [gb.recalibrate(copy.deepcopy(model), [data]) for data in parts]
    merged = gb.merge_statistics(
        [client.state_dict() for client in clients], counts=[{"0": n * 36, "2": n * 16} for n in (4, 12)]
    )
    first = gb.recalibrate(copy.deepcopy(model), [torch.cat(parts)]).state_dict()
    torch.testing.assert_close(merged["0.running_var"], first["0.running_var"])
    model.load_state_dict(merged, strict=False)
    assert set(merged) == {
        f"{i}.{k}" for i in (0, 2) for k in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_weights_are_shares_of_a_mixture_and_need_no_sum():
    model = nn.BatchNorm1d(1)
    ones, threes = copy.deepcopy(model), copy.deepcopy(model)
    for client, mean in ((ones, 1.0), (threes, 3.0)):
        client.running_mean.fill_(mean)
        client.running_var.fill_(2.0)
        client.num_batches_tracked.fill_(5)
    merged = gb.merge_statistics([ones, threes], weights=[3, 1])
    assert merged["running_mean"].item() == pytest.approx(1.5)
    assert merged["running_var"].item() == pytest.approx(2 + 0.75)  # 0.75 is the variance of the means
    assert int(merged["num_batches_tracked"]) == 10
    assert torch.equal(gb.merge_statistics([ones, threes])["running_mean"], torch.tensor([2.0]))


def unlike(change):
    model = gb.recalibrate(small(), [images(8, 0)])
    other = copy.deepcopy(model)
    change(other)
    return [model, other]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: m.__setitem__(2, nn.Identity()), SurgeryError, "2 is in one of them only"),
        (lambda m: m.__setitem__(2, nn.BatchNorm2d(5)), SurgeryError, r"2 is \(4,\) in model 1 and \(5,\)"),
        (lambda m: m[0].reset_running_stats(), SurgeryError, "0 of model 2 has seen no batch"),
        (lambda m: m[0].running_var.fill_(float("nan")), NotFiniteError, "0.running_var of model 2"),
        (lambda m: m[2].running_var.fill_(-1.0), NotFiniteError, "2.running_var of model 2"),
    ],
)
def test_what_cannot_be_merged_is_named(change, error, words):
    with pytest.raises(error, match=words):
        gb.merge_statistics(unlike(change))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": [1]}, "2 models and 1 weights"),
        ({"weights": [0, 0]}, "above 0"),
        ({"weights": [1, -1]}, "at least 0"),
        ({"weights": [1, 1], "counts": [1, 1]}, "not both"),
        ({"counts": [0.5, 3]}, "whole numbers"),
        ({"counts": [{"0": 3}, {"0": 3}]}, "no entry for 2"),
    ],
)
def test_wrong_shares_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        gb.merge_statistics(unlike(lambda m: None), **settings)


def test_instance_norms_are_not_merged():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))
    model(images(8, 0))
    merged = gb.merge_statistics([model, copy.deepcopy(model).state_dict()])
    assert {key[0] for key in merged} == {"0"}


def test_weights_without_a_counter_have_seen_batches_all_the_same():
    model = gb.recalibrate(small(), [images(8, 0)])
    for layer in (model[0], model[2]):
        layer.num_batches_tracked.zero_()
    merged = gb.merge_statistics([model, model])
    torch.testing.assert_close(merged["0.running_var"], model[0].running_var)


def test_nothing_to_merge():
    with pytest.raises(UsageError, match="at least one"):
        gb.merge_statistics([])
    with pytest.raises(SurgeryError, match="nothing to merge"):
        gb.merge_statistics([nn.Linear(2, 2)])
    with pytest.raises(SurgeryError, match="nothing to merge"):
        gb.merge_statistics([nn.LazyBatchNorm2d()])


def test_a_client_keeps_its_norms_at_home():
    model = small()
    at_home = gb.local_statistics(model)
    assert at_home == [key for key in model.state_dict() if key.startswith(("0.", "2."))]
    statistics_alone = gb.local_statistics(model.state_dict(), affine=False)
    assert statistics_alone == [key for key in at_home if not key.endswith(("weight", "bias"))]
    with pytest.raises(SurgeryError, match="nothing to keep at home"):
        gb.local_statistics(nn.Linear(2, 2))


def test_update_bn_is_recalibrate_with_pytorch_s_signature():
    loader = [(images(8, 1), torch.zeros(8)), (images(3, 2, 1.0), torch.zeros(3))]
    averaged = torch.optim.swa_utils.AveragedModel(small())
    expected = gb.recalibrate(copy.deepcopy(averaged), loader).state_dict()
    averaged.train()
    assert gb.update_bn(loader, averaged, device="cpu") is None
    for key, value in expected.items():
        assert torch.equal(averaged.state_dict()[key], value), key
    assert averaged.training
    gb.update_bn([torch.randn(2, 2)], nn.Linear(2, 2))  # nothing to do, and no error, as PyTorch's


def test_adapt_mixes_with_the_prior_s_weight_in_samples():
    model = gb.recalibrate(small(), [images(64, 0)]).eval()
    foggy = [images(8, 3, 2.0), images(8, 4, 2.0)]
    source = copy.deepcopy(model.state_dict())
    adapted = gb.adapt(copy.deepcopy(model), foggy, prior=48).state_dict()
    target = gb.recalibrate(copy.deepcopy(model), foggy).state_dict()
    for key in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(adapted[key], 0.75 * source[key] + 0.25 * target[key])
    # The second norm is measured behind the adapted first one: with no prior, as recalibration in order.
    alone = gb.adapt(copy.deepcopy(model), foggy, prior=0).state_dict()
    in_order = gb.recalibrate(copy.deepcopy(model), foggy, mode="in-order").state_dict()
    assert all(torch.equal(alone[key], in_order[key]) for key in alone)


def test_adapt_refuses_and_leaves_the_model():
    model = gb.recalibrate(small(), [images(8, 0)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="prior"):
        gb.adapt(model, [images(4, 0)], prior=-1)
    with pytest.raises(UsageError, match="give a loader"):
        gb.adapt(model, iter([images(4, 0)]))
    with pytest.raises(UsageError, match="samples"):
        gb.adapt(model, [images(4, 0)], samples=0)
    for name, words in (("a b", "letters"), ("source", "already"), ("train", "modules use themselves")):
        with pytest.raises(UsageError, match=words):
            gb.adapt(model, [], domain=name)
    with pytest.raises(NotFiniteError):
        gb.adapt(model, [images(4, 0) * float("inf")], domain="far")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_adapt_says_what_it_left():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = small(), nn.BatchNorm2d(3)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.used(pixels)

    averaged = torch.optim.swa_utils.AveragedModel(Spare())  # its forward takes any keyword
    with pytest.warns(gb.errors.GammabetaWarning, match="not adapted: spare: the data did not reach it"):
        gb.adapt(averaged, [{"pixels": images(8, 0), "labels": torch.zeros(8)}], domain="far")
    assert gb.domains(averaged) is gb.domains(averaged.module)


def test_domains_stand_side_by_side_and_the_model_says_which():
    model = gb.recalibrate(small(), [images(64, 0)]).eval()
    x = images(4, 9)
    clear = model(x)
    gb.adapt(model, [images(32, 3, 2.0)], prior=0, domain="fog")
    domains = gb.domains(model)
    foggy = model(x)
    assert (domains.names, domains.current) == (["source", "fog"], "fog")
    assert "in use: fog" in repr(model)
    assert not torch.allclose(clear, foggy)
    domains.use("source")
    assert torch.equal(model(x), clear)
    with domains.using("fog"):
        assert torch.equal(model(x), foggy)
    assert domains.current == "source"


def test_what_changes_a_domain_stays_with_it():
    model = gb.recalibrate(small(), [images(64, 0)]).eval()
    domains = gb.domains(model, first="day")
    domains.add("night")
    gb.recalibrate(model, [images(64, 1, 3.0)])
    night = model[0].running_mean.clone()
    domains.use("day")
    assert not torch.equal(model[0].running_mean, night)
    domains.use("night")
    assert torch.equal(model[0].running_mean, night)
    domains.use("day")
    domains.remove("night")
    assert domains.names == ["day"]


def test_domains_are_in_the_state_dict_and_in_copies():
    model = gb.recalibrate(small(), [images(64, 0)]).eval()
    gb.adapt(model, [images(32, 3, 2.0)], domain="fog")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="batch_norm_domains"):
        small().load_state_dict(state)
    twin = small(1).eval()
    gb.domains(twin)
    twin.load_state_dict(state)
    x = images(4, 9)
    for name in ("fog", "source"):
        gb.domains(twin).use(name)
        gb.domains(model).use(name)
        assert torch.equal(twin(x), model(x))
    sorted_twin = small(1).eval()
    gb.domains(sorted_twin)
    sorted_twin.load_state_dict(dict(sorted(state.items())))  # as safetensors does
    assert gb.domains(sorted_twin).current == "fog"
    gb.domains(sorted_twin).use("source")
    assert torch.equal(sorted_twin(x), model(x))
    duplicate = copy.deepcopy(model)
    gb.domains(duplicate).use("fog")
    assert gb.domains(model).current == "source"
    assert not torch.equal(duplicate(x), model(x))


def test_domains_meet_convert_and_fold():
    model = gb.recalibrate(small(), [images(64, 0)]).eval()
    gb.adapt(model, [images(32, 3, 2.0)], prior=0, domain="fog")
    x = images(4, 9)
    foggy = model(x)
    fused = gb.convert(copy.deepcopy(model), to="fused")
    torch.testing.assert_close(fused(x), foggy)
    gb.domains(fused).use("source")
    assert not torch.allclose(fused(x), foggy)
    folded = gb.fold(model, x)
    torch.testing.assert_close(folded(x), foggy, rtol=1e-4, atol=1e-4)
    folded.state_dict()
    with pytest.raises(SurgeryError, match="before you fold"):
        gb.domains(folded).use("source")


@pytest.mark.parametrize("name", ["", "a.b", "_modules", "two words", "x" * 65])
def test_names_of_domains(name):
    with pytest.raises(UsageError, match="letters, digits"):
        gb.domains(gb.recalibrate(small(), [images(8, 0)])).add(name)


def test_domains_that_do_not_exist():
    domains = gb.domains(small())
    with pytest.raises(UsageError, match="no domain 'fog': the model has source"):
        domains.use("fog")
    with pytest.raises(UsageError, match="cannot remove 'source'"):
        domains.remove("source")
    with pytest.raises(UsageError, match="already"):
        domains.add("source")
    with pytest.raises(SurgeryError, match="no batch normalization"):
        gb.domains(nn.Linear(2, 2))
