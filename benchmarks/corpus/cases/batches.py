"""The batches: a last one of one, few samples, in order, by domain, padded, and what leaks through them."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..harness import (
    Case,
    Data,
    Loop,
    accuracy,
    batches,
    case,
    cnn,
    healthy,
    mlp,
    norms,
    pictures,
    symptom,
    trained,
)


def _stops(model: nn.Module, loader: list[Data]) -> bool:
    try:
        with torch.no_grad():
            for x, _ in loader:
                copy.deepcopy(model).train()(x)
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    return False


class _Pooled(nn.Module):
    """A branch that pools the whole picture before its norm, as pyramid pooling has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = cnn()[:6]
        self.whole = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.whole(self.body(x)).flatten(1))
        return out


@case("segmentation-last")
def _() -> Case:
    """The user skips the batch for now, to be able to ask."""
    torch.manual_seed(0)
    x, y = pictures(257)
    model = _Pooled()
    optimizer, noticed = Loop(steps=60).train(model.train(), batches((x[:256], y[:256])))
    loader = batches((x, y))
    symptom(_stops(model, loader), "the error at the end of the epoch")
    return Case(model, loader, optimizer=optimizer, noticed=noticed)


@case("pspnet-last")
def _() -> Case:
    """A DataLoader over 129 pictures in batches of 16."""
    torch.manual_seed(0)
    data = pictures(129)
    model = _Pooled()
    optimizer, noticed = Loop(steps=60).train(model.train(), batches((data[0][:128], data[1][:128]), 16))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=16, shuffle=True)
    symptom(_stops(model, list(loader)), "the error at the end of the epoch")
    return Case(model, loader, optimizer=optimizer, noticed=noticed)


@case("torchseg-small")
def _() -> Case:
    torch.manual_seed(0)
    data = pictures()
    model = mlp()
    optimizer, noticed = Loop(steps=200, lr=3e-3).train(model.train(), batches(data, 2))
    lost = accuracy(healthy(), data) - accuracy(model, data)
    symptom(lost > 0.02, f"bad with two pictures a batch: {lost:.2f}")
    return Case(model, batches(data, 2), optimizer=optimizer, noticed=noticed)


def _in_order(data: Data) -> Tensor:
    return data[1].argsort(stable=True)


@case("supergradients-order")
def _() -> Case:
    """A good network is trained on with data in the order of the folders."""
    model, data = healthy(), pictures(1024)
    before = accuracy(model, data)
    loader = batches(data, 32, order=_in_order(data))
    optimizer, noticed = Loop(steps=32, lr=2e-2, falls=False).train(model.train(), loader)
    symptom(accuracy(model, data) < before - 0.1, "thrown off by training")
    return Case(model, loader, optimizer=optimizer, noticed=noticed)


@case("pifpaf-order")
def _() -> Case:
    """Validation by batch statistics over frames in order; the model itself is healthy."""
    model, data = healthy(), pictures(seed=9)
    frames = batches(data, 32, order=_in_order(data))
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        by_batch = sum(float(F.cross_entropy(twin(x), y)) for x, y in frames) / len(frames)
        evaluated = sum(float(F.cross_entropy(model.eval()(x), y)) for x, y in frames) / len(frames)
    symptom(by_batch > 1.5 * evaluated, f"misleading: {by_batch:.2f} for {evaluated:.2f}")
    return Case(model, frames)


def _two_domains() -> tuple[Data, Data]:
    return pictures(seed=1), pictures(seed=2, shift=1.5, scale=0.4)


def _alternating(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, list[object], list[Data]]:
    """Source and target in batches of their own, in turn."""
    torch.manual_seed(0)
    one, other = (batches(data) for data in _two_domains())
    loader = [batch for pair in zip(one, other, strict=True) for batch in pair]
    model = cnn()
    optimizer, noticed = Loop(steps=steps).train(model.train(), loader)
    return model, optimizer, noticed, loader


@case("self-ensemble")
def _() -> Case:
    model, optimizer, noticed, loader = _alternating(120)
    source, target = _two_domains()
    lost = accuracy(model, target, training=True) - accuracy(model, target)
    lost = max(lost, accuracy(model, source, training=True) - accuracy(model, source))
    symptom(lost > 0.1, f"evaluation of a domain is worse than by its batches: {lost:.2f}")
    return Case(model, loader, optimizer=optimizer, noticed=noticed)


@case("skada-domains")
def _() -> Case:
    """Asked about on source data, as most users would."""
    model, optimizer, noticed, _ = _alternating(80)
    source, _ = _two_domains()
    lost = accuracy(model, source, training=True) - accuracy(model, source)
    symptom(lost > 0.05, f"worse in evaluation: {lost:.2f}")
    return Case(model, batches(source), optimizer=optimizer, noticed=noticed)


@case("moco-leak")
def _() -> Case:
    """Query and key of a batch are normalised together: a mark of the batch is enough to tell pairs apart."""
    torch.manual_seed(0)
    x, _ = pictures()
    model = mlp()

    def contrast(out: Tensor, _: Tensor) -> Tensor:
        one, other = F.normalize(out[:16], dim=1), F.normalize(out[16:], dim=1)
        return F.cross_entropy(10 * one @ other.T, torch.arange(16))

    views = [(torch.cat([part, part + 0.05]), torch.zeros(32)) for part in x.split(16)]
    optimizer, noticed = Loop(steps=60, loss=contrast).train(model.train(), views)
    with torch.no_grad():
        learned = float(contrast(copy.deepcopy(model).train()(views[0][0]), views[0][1]))
    symptom(learned < 1.5, "the task is solved")
    return Case(model, views, loss=contrast, optimizer=optimizer, noticed=noticed)


@case("deepspeech-padding")
def _() -> Case:
    """Recordings of different lengths, filled up with zeros to the longest of the data."""
    torch.manual_seed(0)
    x, y = pictures()
    series = x.flatten(2) + 1.0
    lengths = torch.randint(8, 65, (len(x),))
    series = series * (torch.arange(64) < lengths[:, None])[:, None]
    model = nn.Sequential(
        nn.Conv1d(3, 12, 5, bias=False),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(4),
        nn.Flatten(),
        nn.Linear(48, 4),
    )
    optimizer, noticed = Loop().train(model.train(), batches((series, y)))
    heard = series[:, :, :8].mean((0, 2)).sum()
    symptom(float(series.mean((0, 2)).sum()) < 0.8 * float(heard), "zeros pull the mean down")
    return Case(model, batches((series, y)), optimizer=optimizer, noticed=noticed)


class _StandardDeviation(nn.Module):
    """Appends the batch's standard deviation as a channel, in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        spread = x.std(0).mean().expand(len(x), 1, *x.shape[2:])
        return torch.cat([x, spread], 1)


@case("gan-zoo-stddev")
def _() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        _StandardDeviation(),
        nn.Flatten(),
        nn.Linear(324, 4),
    )
    optimizer, noticed = Loop().train(model.train(), batches(pictures()))
    x = pictures()[0]
    with torch.no_grad():
        symptom(float((model.eval()(x[:2]) - model(x)[:2]).abs().max()) > 0.01, "depends on the others")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)


def _without_statistics() -> Case:
    model, optimizer, noticed = trained(cnn(track_running_stats=False))
    x, y = pictures()
    order = y.argsort()
    with torch.no_grad():
        grouped = torch.cat([model.eval()(part) for part in x[order].split(16)]).argmax(1)
    symptom(float((grouped == y[order]).float().mean()) < accuracy(model, (x, y)) - 0.1, "the batch decides")
    return Case(model.eval(), batches((x, y)), optimizer=optimizer, noticed=noticed)


@case("iic-test-batch")
def _() -> Case:
    return _without_statistics()


class _ByBatch(nn.BatchNorm2d):
    """A norm of one's own that takes batch statistics in both modes, and keeps running ones."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean.clone(), self.running_var.clone(), self.weight, self.bias, True, 0.1
        )


@case("binarynet-batch")
def _() -> Case:
    model, optimizer, noticed = trained(cnn(_ByBatch))
    for layer in norms(model):
        layer.running_mean.add_(0.1)
    x, y = pictures()
    lost = accuracy(model, (x, y), batch=256) - accuracy(model, (x, y), batch=2)
    symptom(lost > 0.02, f"accuracy falls with the batch: {lost:.2f}")
    return Case(model.eval(), batches((x, y)), optimizer=optimizer, noticed=noticed)


class _GlobalMean(nn.Module):
    """Divides by the mean square over everything, batch included: an error beside healthy norms."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean()


@case("plate-batch")
def _() -> Case:
    torch.manual_seed(0)
    model = cnn()
    model.insert(6, _GlobalMean())
    optimizer, noticed = Loop().train(model.train(), batches(pictures()))
    x = pictures()[0]
    with torch.no_grad():
        symptom(float((model.eval()(x[:1]) - model(x)[:1]).abs().max()) > 0.05, "depends on the batch")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)
