"""Not the norms' fault: preprocessing, labels, rounding. Whoever blames batch norm is wrong."""

import torch
from torch import Tensor, nn

from ..harness import Case, Data, Loop, accuracy, batches, case, cnn, healthy, pictures, symptom, trained


def _served(model: nn.Module, seen: Data, served: Tensor, noticed: list[object]) -> Case:
    """A network that is good on what it saw, and is given something else in use."""
    good, bad = accuracy(model, seen), accuracy(model, (served, seen[1]))
    symptom(bad < good - 0.1, f"accuracy {bad:.2f} in use, {good:.2f} before")
    return Case(model.eval(), batches((served, seen[1])), noticed=noticed)


@case("kits-standardise")
def _() -> Case:
    """Standardised in training, raw in evaluation."""
    x, y = pictures(scale=200.0, shift=50.0)
    standard = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    model, _, noticed = trained(cnn(), (standard, y))
    return _served(model, (standard, y), x, noticed)


@case("resnet-mean-image")
def _() -> Case:
    """In use each picture loses its own mean, and over its rows only."""
    x, y = pictures()
    centred = x - x.mean(0)
    model, _, noticed = trained(cnn(), (centred, y))
    return _served(model, (centred, y), x - x.mean(2, keepdim=True), noticed)


@case("rfdetr-channels")
def _() -> Case:
    """Red and blue swapped."""
    x, y = pictures()
    return _served(healthy(), (x, y), x.flip(1), [])


class _Standardising(nn.Module):
    """Normalises pictures inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = cnn()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net((x - 0.45) / 0.22)
        return out


@case("detecto-twice")
def _() -> Case:
    """The user normalises, too."""
    x, y = pictures()
    model, _, noticed = trained(_Standardising(), (x, y))
    return _served(model, (x, y), (x - 0.45) / 0.22, noticed)


@case("groupmix-labels")
def _() -> Case:
    """The labels of another version of the data set: two classes have changed places."""
    model, (x, y) = healthy(), pictures(seed=7)
    other = torch.tensor([1, 2, 0, 3])[y]
    symptom(accuracy(model, (x, other)) < 0.5 < accuracy(model, (x, y)), "low accuracy")
    return Case(model.eval(), batches((x, other)))


@case("clip-batch")
def _() -> Case:
    """Half precision: other kernels for other sizes round differently."""
    torch.manual_seed(0)
    model = cnn()
    Loop(watched=False).train(model.train(), batches(pictures()))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bfloat16()

    class Served(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.net(x)
            return out.float()

    served = Served().eval()
    x = pictures()[0]
    with torch.no_grad():
        apart = (served(x[:3]) - served(x)[:3]).abs().max()
    symptom(float(apart) < 0.05, "a little, if at all")
    return Case(served, batches(pictures()))
