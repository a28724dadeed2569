"""Frozen by half, thawed by accident, left in evaluation."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..harness import (
    CLASSES,
    Case,
    Data,
    Loop,
    accuracy,
    batches,
    case,
    cnn,
    healthy,
    norms,
    pictures,
    symptom,
)


def _shifted() -> Data:
    return pictures(seed=2, shift=0.6, scale=0.6)


@case("frozen-requires-grad")
def _() -> Case:
    """All but the head has requires_grad False; train() is called as always."""
    model = healthy().requires_grad_(False)
    model[-1] = nn.Linear(64, CLASSES)
    with torch.no_grad():
        before = model[:-1].eval()(pictures()[0])
    optimizer, noticed = Loop(steps=40).train(model.train(), batches(_shifted()))
    with torch.no_grad():
        after = model[:-1].eval()(pictures()[0])
    symptom(float((after - before).abs().max()) > 0.1, "the frozen part gives something else")
    return Case(model.train(), batches(_shifted()), optimizer=optimizer, noticed=noticed)


@case("adaptsegnet")
def _() -> Case:
    """Norms without gradient; each step ends with a pass over a darker target domain."""
    source, target = pictures(), pictures(seed=4, shift=1.5, scale=0.4)
    model = healthy()
    for layer in norms(model):
        layer.requires_grad_(False)
    dark = batches(target)

    def adapt(step: int) -> None:
        with torch.no_grad():
            for x, _ in (dark * 2)[step % 8 : step % 8 + 4]:
                model(x)

    optimizer, noticed = Loop(steps=40, lr=1e-3, after=adapt).train(model.train(), batches(source))
    lost = accuracy(model, source, training=True) - accuracy(model, source)
    symptom(lost > 0.1, f"evaluation on the source is bad: {lost:.2f}")
    return Case(model.train(), batches(source), optimizer=optimizer, noticed=noticed)


class _Frozen(nn.Module):
    """A network that freezes its norms when it is made, and is put in training by its user's loop."""

    def __init__(self) -> None:
        super().__init__()
        self.net = healthy()
        for layer in norms(self):
            layer.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@case("deeplab-thawed")
def _() -> Case:
    """Frozen for the first epoch; train() before the second."""
    model, data = _Frozen(), _shifted()
    model.net[-1] = nn.Linear(64, CLASSES)
    for layer in norms(model):
        layer.eval()
    kept = norms(model)[0].running_mean.clone()

    def epoch(step: int) -> None:
        if step == 16:
            model.train()

    optimizer, noticed = Loop(steps=48, before=epoch).train(model, batches(data, 32))
    symptom(not torch.equal(norms(model)[0].running_mean, kept), "the frozen statistics moved")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


@case("avalanche-thawed")
def _() -> Case:
    """The evaluation in the middle of an epoch ends with train() on every module."""
    model, data = healthy().train(), _shifted()
    for layer in norms(model):
        layer.eval()
        layer.requires_grad_(False)
    kept = norms(model)[0].running_mean.clone()

    def periodic(step: int) -> None:
        if step == 20:
            accuracy(model, data)
            for module in model.modules():
                module.training = True

    optimizer, noticed = Loop(steps=50, after=periodic).train(model, batches(data))
    symptom(not torch.equal(norms(model)[0].running_mean, kept), "the frozen statistics moved")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


def _never_back(batch: int, every: int) -> Case:
    """A validation that ends without train()."""
    torch.manual_seed(0)
    model, data = cnn(), pictures()
    counts: list[int] = []

    def validate(step: int) -> None:
        if step % every == every - 1:
            accuracy(model, data)  # calls eval()
            counts.append(int(norms(model)[0].num_batches_tracked))

    optimizer, noticed = Loop(steps=60, after=validate).train(model.train(), batches(data, batch))
    symptom(len(set(counts)) == 1, "no update after the first validation")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


@case("grid-anchor-eval")
def _() -> Case:
    return _never_back(8, 20)


@case("fcn-eval")
def _() -> Case:
    return _never_back(32, 15)


@case("vsepp-eval")
def _() -> Case:
    """Validation every few steps, train() at the beginning of each epoch only."""
    torch.manual_seed(0)
    model, data = cnn(), pictures()
    model.insert(8, nn.Dropout(0.3))

    def epoch(step: int) -> None:
        if step % 64 == 0:
            model.train()

    def validate(step: int) -> None:
        if step % 20 == 19:
            accuracy(model, data)

    optimizer, noticed = Loop(steps=128, before=epoch, after=validate).train(model, batches(data, 8))
    symptom(int(norms(model)[0].num_batches_tracked) < 64, "most of the steps were in evaluation")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


@case("covnet-train-in-eval")
def _() -> Case:
    """Evaluation puts the norms in training; one scan of few slices at a time."""
    model, data = healthy(), pictures()
    model.eval()
    for layer in norms(model):
        layer.train()
        layer.requires_grad_(False)

    def answers(size: int) -> Tensor:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            return torch.cat([twin(x) for x in data[0][:64].split(size)])

    symptom(float((answers(1) - answers(64)).abs().max()) > 1, "an answer depends on the batch")
    return Case(model, batches(data))


@case("yolact-frozen-random")
def _() -> Case:
    """Small batches freeze the norms; the backbone is new and has no statistics to freeze."""
    torch.manual_seed(0)
    data = pictures(scale=255.0)
    model: Any = cnn()
    for layer in norms(model):
        layer.requires_grad_(False)

    def freeze(step: int) -> None:
        for layer in norms(model):
            layer.eval()

    optimizer, noticed = Loop(steps=40, before=freeze, lr=0.1).train(model.train(), batches(data, 4))
    freeze(0)
    symptom(norms(model)[0].running_mean.eq(0).all().item(), "statistics of a new layer")
    return Case(model, batches(data, 4), optimizer=optimizer, noticed=noticed)
