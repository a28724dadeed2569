"""Group, instance and layer norm in the place of batch norm, fitted and distilled."""

import copy

import pytest
import torch
from torch import nn

import gammabeta as gb
from gammabeta.errors import DivergedError, SurgeryError, UsageError


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        return self.head(torch.relu(self.norm(self.conv(x)) + x).mean((2, 3)))


def images(count: int = 24, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(count, 3, 8, 8, generator=generator) * 2 + 1).split(8))


def trained() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    for norm in (model.first[1], model.norm):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return gb.recalibrate(model, images(96)).eval()


@pytest.mark.parametrize(("to", "groups"), [("group", 4), ("instance", 16), ("layer", 1)])
def test_each_batch_norm_becomes_a_group_norm(to, groups):
    model = trained()
    before = copy.deepcopy(model.state_dict())
    new = gb.convert(model, to)
    norms = [m for m in new.modules() if isinstance(m, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [groups] * 2
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in new.modules())
    assert torch.equal(norms[0].weight, model.first[1].weight)
    assert "2 batch norms became" in str(new.conversion_report)
    assert "not fitted" in str(new.conversion_report)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "asked", "given"), [(12, 32, 3), (10, 3, 2), (6, 2, 1), (3, 32, 1), (128, 32, 32)]
)
def test_groups_divide_the_channels_and_have_four_or_more(channels, asked, given):
    assert gb.convert(nn.BatchNorm2d(channels), "group", groups=asked).num_groups == given


def test_fitting_is_least_squares_and_brings_the_outputs_nearer():
    model, data = trained(), images()
    fitted = gb.convert(model, "group", fit=data)
    plain = gb.convert(model, "group")
    x = torch.cat(data)
    wanted = model.first[1](model.first[0](x))
    found = fitted.first[1](fitted.first[0](x))
    unit = nn.functional.group_norm(fitted.first[0](x), 4)
    for channel in (0, 7):
        columns = torch.stack([unit[:, channel].flatten(), torch.ones(x.shape[0] * 64)], 1).double()
        line = torch.linalg.lstsq(columns, wanted[:, channel].flatten().double()[:, None]).solution.flatten()
        torch.testing.assert_close(fitted.first[1].weight[channel].double(), line[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fitted.first[1].bias[channel].double(), line[1], rtol=1e-5, atol=1e-5)
    share = 1 - ((found - wanted).var() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).var()).item()
    assert fitted.conversion_report.replaced[0].explained == pytest.approx(share, abs=1e-3)
    near = [(m(x) - model(x)).square().mean().item() for m in (fitted, plain)]
    assert near[0] < near[1]


def test_ours_fused_are_taken_apart_first():
    model = trained()
    fused = gb.convert(copy.deepcopy(model), "fused")
    assert fused.conversion_report.fused
    x = images()[0]
    torch.testing.assert_close(
        gb.convert(fused, "group", fit=images())(x), gb.convert(model, "group", fit=images())(x)
    )


def test_standardized_weights():
    model = trained()
    new = gb.convert(model, "group", standardize=True, fit=images())
    weight = new.conv.weight
    assert weight.mean((1, 2, 3)).abs().max() < 1e-7
    torch.testing.assert_close(weight.std((1, 2, 3)), model.conv.weight.std((1, 2, 3)))
    assert new.conversion_report.standardized == ["first.0", "conv"]


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_class_of_its_own_is_left_and_named():
    new = gb.convert(nn.Sequential(nn.BatchNorm2d(8), OwnNorm(8)), "group")
    assert isinstance(new[0], nn.GroupNorm)
    assert isinstance(new[1], OwnNorm)
    assert "left: 1: OwnNorm is a class of its own" in str(new.conversion_report)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"to": "grup"}, UsageError, "group, instance, layer"),
        ({"to": "group", "groups": 0}, UsageError, "at least 1"),
        ({"to": "group", "fit": iter([])}, UsageError, "not an iterator"),
        ({"to": "group", "fit": []}, SurgeryError, "no data"),
        ({"to": "fused", "groups": 4}, UsageError, "groups, fit and standardize work with"),
        ({"to": "group", "example": images()[0]}, UsageError, "fit= instead"),
    ],
)
def test_wrong_arguments(settings, error, words):
    with pytest.raises(error, match=words):
        gb.convert(trained(), **settings)


def test_single_values_cannot_be_normalised():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    with pytest.raises(SurgeryError, match="single values"):
        gb.convert(model, "instance", fit=[torch.randn(8, 3)])
    assert gb.convert(model, "group", fit=[torch.randn(8, 3)])[1].num_groups == 2


def test_per_sample_gradients_under_vmap():
    from torch.func import functional_call, grad, jacrev, vmap

    new = gb.convert(trained(), "group", fit=images()).train()
    parameters = dict(new.named_parameters())
    x = images()[0]

    def loss(parameters, image):
        return functional_call(new, parameters, (image[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)["conv.weight"]
    one = grad(loss)(parameters, x[3])["conv.weight"]
    torch.testing.assert_close(each[3], one, rtol=1e-4, atol=1e-5)
    assert jacrev(lambda image: new(image[None])[0])(x[0]).shape == (4, 3, 8, 8)


def test_distillation_brings_the_outputs_nearer_and_reports_it():
    model, data = trained(), images(64)
    labelled = [(x, model(x).argmax(1)) for x in data]
    new = gb.convert(model, "group", fit=data)
    seen = []
    report = gb.distil(new, model, labelled, steps=30, progress=lambda step, loss: seen.append((step, loss)))
    assert report.after.distance < report.before.distance
    assert report.after.accuracy == (1.0, report.after.agreement)
    assert [step for step, _ in seen] == list(range(1, 31))
    assert not any(module.training for module in new.modules())
    assert all(parameter.grad is None for parameter in new.parameters())
    assert "after 30 steps: outputs differ by" in str(report)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"steps": 0}, UsageError, "above 0"),
        ({"learning_rate": 1e30, "steps": 4}, DivergedError, "smaller learning_rate"),
    ],
)
def test_a_distillation_that_fails_leaves_the_model(settings, error, words):
    model = trained()
    new = gb.convert(model, "group")
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(error, match=words):
        gb.distil(new, model, images(), **settings)
    assert all(torch.equal(before[key], value) for key, value in new.state_dict().items())


def test_distillation_refuses_what_cannot_be_imitated():
    model = trained()
    other = copy.deepcopy(model)
    other.head = nn.Linear(16, 5)
    with pytest.raises(SurgeryError, match="different shapes"):
        gb.distil(other, model, images(), steps=1)
    with pytest.raises(UsageError, match="not an iterator"):
        gb.distil(other, model, iter(images()), steps=1)


@pytest.mark.filterwarnings("ignore")  # its own, when imported
def test_opacus_takes_the_result():
    validators = pytest.importorskip("opacus.validators", reason="Opacus is not installed")
    model = trained()
    assert validators.ModuleValidator.validate(model)
    for to in ("group", "instance", "layer"):
        assert validators.ModuleValidator.validate(gb.convert(model, to, standardize=True).train()) == []
