"""Short trainings of ten healthy kinds, and the same with a fault that shows itself while one trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta.guard import Noticed
from gammabeta.nn import BatchNorm2d as FusedBatchNorm2d

from ..faults.subjects import Residual, Reused, cnn, digits, discriminator, generator, mlp, volume

STEPS, BEGIN = 64, 10  # of a healthy training; the step after which a fault that comes later begins
Watch = Callable[..., AbstractContextManager[Any]]


@dataclass
class Loop:
    """A training loop, with the places at which a fault may stand."""

    model: nn.Module
    batch: int = 32
    steps: int = STEPS
    lr: float = 3e-3
    decay: float = 0.0
    sgd: bool = False
    accumulate: int = 1
    sorted_by_class: bool = False
    autocast: bool = False
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    before: Callable[[int, nn.Module], object] = lambda step, model: None
    change: Callable[[int, Tensor], Tensor] = lambda step, x: x
    after: Callable[[int, nn.Module, Tensor], object] = lambda step, model, x: None
    penalty: Callable[[nn.Module], Any] = lambda model: 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, guarded: bool = True) -> list[Noticed]:
        """Train; return what the guard noticed."""
        images, labels = digits()
        learning = [p for p in self.model.parameters() if p.requires_grad]
        kind: Any = torch.optim.SGD if self.sgd else torch.optim.Adam
        extra = {"momentum": 0.9} if self.sgd and not self.decay else {}
        optimizer = kind(learning, lr=self.lr, weight_decay=self.decay, **extra)
        noticed: list[Noticed] = []
        watched: Any = nullcontext()
        if guarded:
            watched = gb.watch(self.model, optimizer, tell=noticed.append, **self.options)
        order = labels.argsort(stable=True) if self.sorted_by_class else torch.randperm(len(images))
        batches = list(order.split(self.batch))
        if self.sorted_by_class:
            batches = [batches[i] for i in torch.randperm(len(batches))]
        self.model.train()
        with watched:
            for step in range(self.steps):
                self.before(step, self.model)
                optimizer.zero_grad()
                for part in range(self.accumulate):
                    index = batches[(step * self.accumulate + part) % len(batches)]
                    x = self.change(step, self.prepare(images[index]))
                    with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                        loss = F.cross_entropy(self.model(x).float(), labels[index])
                    torch.autograd.backward(loss + self.penalty(self.model))
                optimizer.step()
                self.after(step, self.model, x)
        return noticed


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


class Checkpointed(nn.Module):
    """A network in one checkpointed piece."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The inner network's output."""
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


def _stack(images: Tensor) -> Tensor:
    small = F.avg_pool2d(images, 2)
    return torch.stack([small.roll(shift, -1) for shift in range(-2, 4)], 2)


def _volume() -> nn.Module:
    model = volume()
    with torch.no_grad():
        model(torch.rand(2, 1, 6, 14, 14))
    for layer in norms(model):
        layer.reset_running_stats()
    return model


def _frozen() -> nn.Module:
    """A backbone with frozen batch norm, trained a little beforehand, and a new head."""
    model = cnn()
    Loop(model, steps=60).run(guarded=False)
    for layer in norms(model):
        layer.requires_grad_(False)
    model[-1] = nn.Linear(400, 10)
    return model


def _hold(step: int, model: nn.Module) -> None:
    for layer in norms(model):
        layer.eval()


class _Gan:
    """Generator and discriminator in turns, real and generated digits in batches of their own."""

    def run(self) -> list[Noticed]:
        images, _ = digits()
        made, judge = generator(), discriminator()
        first = torch.optim.Adam(made.parameters(), lr=1e-3, betas=(0.5, 0.99))
        second = torch.optim.Adam(judge.parameters(), lr=3e-4, betas=(0.5, 0.99))
        noticed: list[Noticed] = []
        logits = F.binary_cross_entropy_with_logits
        with gb.watch(made, first, tell=noticed.append), gb.watch(judge, second, tell=noticed.append):
            for index in torch.randperm(len(images)).repeat(4)[: STEPS * 64].split(64):
                fake = made(torch.randn(64, 16))
                second.zero_grad()
                real = logits(judge(images[index]), torch.ones(len(index)))
                torch.autograd.backward(real + logits(judge(fake.detach()), torch.zeros(64)))
                second.step()
                first.zero_grad()
                torch.autograd.backward(logits(judge(fake), torch.ones(64)))
                first.step()
        return noticed


HEALTHY: dict[str, Callable[[], Any]] = {
    "fully connected": lambda: Loop(mlp()),
    "convolutions, SGD": lambda: Loop(cnn(), sgd=True, lr=0.1, decay=5e-4),
    "our layers": lambda: Loop(gb.convert(cnn(FusedBatchNorm2d))),
    "3-D": lambda: Loop(_volume(), prepare=_stack),
    "residual": lambda: Loop(Residual(), lr=1e-2),
    "siamese": lambda: Loop(Reused()),
    "frozen backbone": lambda: Loop(_frozen(), before=_hold),
    "GAN": _Gan,
    "gradient accumulation": lambda: Loop(cnn(), batch=16, accumulate=2),
    "bfloat16 by autocast": lambda: Loop(Residual(), autocast=True),
}


@dataclass(frozen=True)
class Fault:
    """A training with a fault, the codes of which one must be noticed, and the step where it begins."""

    make: Callable[[], Loop]
    codes: tuple[str, ...]
    begins: int = 0


def _set(**attributes: Any) -> Callable[[nn.Module], nn.Module]:
    def apply(model: nn.Module) -> nn.Module:
        for layer in norms(model):
            for name, value in attributes.items():
                setattr(layer, name, value)
        return model

    return apply


def _put_back() -> Loop:
    """Buffers that other code sets back after each step, to those of before it."""
    kept: list[Tensor] = []

    def before(step: int, model: nn.Module) -> None:
        kept[:] = [t.clone() for layer in norms(model) for t in (layer.running_mean, layer.running_var)]

    def after(step: int, model: nn.Module, x: Tensor) -> None:
        for layer, mean, var in zip(norms(model), kept[::2], kept[1::2], strict=True):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)

    return Loop(cnn(), before=before, after=after)


def _look_twice() -> Loop:
    """The accuracy of the batch by a second pass, in training mode."""
    loop = Loop(cnn())

    def change(step: int, x: Tensor) -> Tensor:
        if step >= BEGIN:
            with torch.no_grad():
                loop.model(x)
        return x

    loop.change = change
    return loop


def _validate(step: int, model: nn.Module) -> None:
    if step == BEGIN:
        model.eval()


def _thaw() -> Loop:
    """Norms set to evaluation once, and train() at each epoch."""
    model = _frozen().requires_grad_(True)

    def before(step: int, model: nn.Module) -> None:
        if step == 0:
            _hold(step, model)
        elif step == BEGIN:
            model.train()

    return Loop(model, before=before)


def _half_thawed() -> Loop:
    model = cnn()
    for layer in norms(model):
        layer.requires_grad_(False)
    return Loop(model)


def _nan(step: int, x: Tensor) -> Tensor:
    return x * float("nan") if step >= 20 and step % 7 == 0 else x


class _ReluFirst(nn.Sequential):
    """Convolution, ReLU, batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 169, 10),
        )


def _pull(model: nn.Module) -> Any:
    """A penalty that pulls biases before the ReLU far down."""
    return 50 * next(m for m in model.modules() if isinstance(m, nn.Conv2d)).bias.sum()


def _gap() -> Loop:
    images, labels = digits()
    held = [(images[i : i + 64], labels[i : i + 64]) for i in (0, 64)]
    return Loop(_set(momentum=1e-3)(cnn()), options={"held": held, "loss": F.cross_entropy})


FAULTS: dict[str, Fault] = {
    "momentum 0": Fault(lambda: Loop(_set(momentum=0.0)(cnn())), ("momentum",)),
    "another framework's momentum": Fault(lambda: Loop(_set(momentum=0.99)(cnn())), ("momentum",)),
    "buffers put back each step": Fault(_put_back, ("never-updated",)),
    "statistics in bfloat16": Fault(
        lambda: Loop(cnn().bfloat16(), prepare=lambda x: x.bfloat16()), ("half-precision-buffers",)
    ),
    "batches of four": Fault(lambda: Loop(cnn(), batch=4), ("tiny-batch",)),
    "batches of one class": Fault(lambda: Loop(mlp(), sorted_by_class=True), ("non-iid-batches",)),
    "activation checkpointing": Fault(lambda: Loop(Checkpointed(cnn())), ("double-update",)),
    "a second pass in training mode": Fault(_look_twice, ("double-update",), BEGIN),
    "eval() and no train()": Fault(lambda: Loop(cnn(), before=_validate), ("partly-frozen",), BEGIN),
    "train() thaws frozen layers": Fault(_thaw, ("partly-frozen",), BEGIN),
    "γ and β frozen, statistics not": Fault(_half_thawed, ("partly-frozen",)),
    "NaN batches left out": Fault(
        lambda: Loop(cnn(FusedBatchNorm2d), change=_nan), ("invalid-statistics",), 20
    ),
    "NaN batches": Fault(lambda: Loop(cnn(), change=_nan), ("invalid-statistics",), 20),
    "variance collapses": Fault(
        lambda: Loop(cnn(), sgd=True, lr=0.05, decay=6.0), ("collapsed-variance", "dead-input")
    ),
    "variance runs away": Fault(lambda: Loop(mlp(), sgd=True, lr=300.0), ("exploding-variance",)),
    "channels die": Fault(lambda: Loop(_ReluFirst(), lr=3e-2, penalty=_pull), ("dead-input",)),
    "evaluation worse than training": Fault(_gap, ("train-eval-gap",)),
}
