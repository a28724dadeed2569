"""Averaged weights with statistics that are not theirs: teachers, generators, servers, target networks."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..harness import (
    Case,
    Loop,
    accuracy,
    average,
    batches,
    behind,
    case,
    cnn,
    healthy,
    norms,
    pictures,
    symptom,
    trained,
)


def _student(
    teacher: nn.Module, *, keep: float = 0.9, buffers: bool = False, **loop: Any
) -> tuple[nn.Module, list[Any]]:
    """Train a student whose weights the teacher averages."""
    student = copy.deepcopy(teacher).train()
    after = lambda step: average(teacher, student, keep, buffers=buffers)  # noqa: E731
    data = loop.pop("data", pictures())
    _, noticed = Loop(after=after, **loop).train(student, batches(data))
    return student, noticed


@case("mean-teacher")
def _() -> Case:
    torch.manual_seed(0)
    teacher = cnn().eval()
    _, noticed = _student(teacher)
    symptom(
        accuracy(teacher, pictures(), training=True) > accuracy(teacher, pictures()) + 0.1, "a bad teacher"
    )
    return Case(teacher, batches(pictures()), noticed=noticed)


@case("ignite-ema")
def _() -> Case:
    """Buffers are taken from the student at the start and not again, while it learns on."""
    torch.manual_seed(0)
    teacher = cnn().eval()
    _student(teacher, steps=20, watched=False, buffers=True)
    teacher.eval()
    _, noticed = _student(teacher, steps=60, lr=3e-2)
    ratio = behind(teacher, pictures())
    symptom(ratio > 1.3, f"worse by its own statistics: {ratio:.2f} times the loss")
    return Case(teacher, batches(pictures()), noticed=noticed)


@case("cosmix-teacher")
def _() -> Case:
    """Both begin pretrained; the student moves to another domain, the teacher's statistics stay."""
    teacher = healthy().eval()
    target = pictures(seed=6, shift=0.8, scale=0.5)
    _, noticed = _student(teacher, data=target, steps=80)
    lost = accuracy(teacher, target, training=True) - accuracy(teacher, target)
    symptom(lost > 0.1, f"statistics of the old domain: {lost:.2f}")
    return Case(teacher, batches(target), noticed=noticed)


@case("pytorch-ema")
def _() -> Case:
    """Averaged parameters are copied into the model, whose statistics are those of its last weights."""
    torch.manual_seed(0)
    model = cnn().train()
    shadow = copy.deepcopy(model)
    after = lambda step: average(shadow, model, 0.97)  # noqa: E731
    optimizer, noticed = Loop(steps=60, lr=5e-2, after=after, falls=False).train(model, batches(pictures()))
    with torch.no_grad():
        for mine, its in zip(model.parameters(), shadow.parameters(), strict=True):
            mine.copy_(its)
    lost = accuracy(model, pictures(), training=True) - accuracy(model, pictures())
    symptom(lost > 0.05, f"worse in evaluation: {lost:.2f}")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)


def _generator() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 192),
        nn.Unflatten(1, (3, 8, 8)),
    )


def _averaged_generator(start: nn.Module, steps: int) -> tuple[nn.Module, list[Any]]:
    """A generator that learns to match the pictures' moments, and its average."""
    made = copy.deepcopy(start).train()
    real = pictures()[0]

    def match(out: Tensor, _: Tensor) -> Tensor:
        return (out.mean(0) - real.mean(0)).square().mean() + (out.std(0) - real.std(0)).square().mean()

    torch.manual_seed(1)
    noise = [(torch.randn(32, 8) + 1, torch.zeros(32)) for _ in range(16)]
    after = lambda step: average(start, made, 0.9)  # noqa: E731
    _, noticed = Loop(steps=steps, loss=match, after=after, lr=3e-2).train(made, noise)
    return start.eval(), noticed


def _odd(model: nn.Module, noise: Tensor) -> float:
    with torch.no_grad():
        own = copy.deepcopy(model).train()(noise)
        return float((model.eval()(noise) - own).square().mean().sqrt() / own.std())


@case("oasis-generator")
def _() -> Case:
    """The average began with the statistics of a short training."""
    torch.manual_seed(0)
    start = _generator()
    start.train()
    for _ in range(40):
        start(torch.randn(32, 8) + 1)
    model, noticed = _averaged_generator(start, 120)
    noise = torch.randn(256, 8) + 1
    symptom(_odd(model, noise) > 0.2, "pictures differ by which statistics are used")
    return Case(model, list(noise.split(32)), loss=None, noticed=noticed)


@case("fastgan-generator")
def _() -> Case:
    torch.manual_seed(0)
    model, noticed = _averaged_generator(_generator(), 80)
    noise = torch.randn(256, 8) + 1
    symptom(_odd(model, noise) > 0.2, "pictures are bad in evaluation")
    return Case(model, list(noise.split(32)), loss=None, noticed=noticed)


@case("composer-swa")
def _() -> Case:
    """Averaging begins in the last epoch; nobody updates the statistics of the average."""
    torch.manual_seed(0)
    model = cnn().train()
    swa = AveragedModel(model)
    after = lambda step: swa.update_parameters(model) if step >= 40 else None  # noqa: E731
    optimizer, noticed = Loop(steps=80, lr=5e-2, after=after, falls=False).train(model, batches(pictures()))
    ratio = behind(swa.module, pictures())
    symptom(ratio > 1.3, f"poor without an update: {ratio:.2f} times the loss")
    return Case(swa, batches(pictures()), optimizer=optimizer, noticed=noticed)


@case("lightning-swa")
def _() -> Case:
    """The pass that should measure the statistics runs with momentum 0 after a reset."""
    model, optimizer, noticed = trained()
    swa = copy.deepcopy(model).train()
    for layer in norms(swa):
        layer.reset_running_stats()
        layer.momentum = 0.0
    with torch.no_grad():
        for x, _ in batches(pictures()):
            swa(x)
    for layer in norms(swa):
        layer.momentum = 0.1
    symptom(accuracy(swa, pictures()) < accuracy(model, pictures()) - 0.1, "bad after averaging only")
    return Case(swa.eval(), batches(pictures()), optimizer=optimizer, noticed=noticed)


@case("sb3-target")
def _() -> Case:
    """A target network: parameters follow by Polyak averaging, buffers never."""
    torch.manual_seed(0)
    target = cnn().eval()
    _, noticed = _student(target, keep=0.95, steps=120)
    symptom(norms(target)[0].running_var.eq(1).all().item(), "the target's statistics were never written")
    return Case(target, batches(pictures()), noticed=noticed)


def _clients() -> list[nn.Module]:
    start = healthy()
    found = []
    for number, (shift, scale) in enumerate(((0.0, 1.0), (1.0, 0.5), (-1.0, 1.5))):
        client = copy.deepcopy(start)
        data = pictures(seed=20 + number, shift=shift, scale=scale)
        Loop(steps=30, lr=3e-3, watched=False).train(client.train(), batches(data))
        found.append(client)
    return found


@case("pfl-fedavg")
def _() -> Case:
    """The server's model is a copy of the first client's with all parameters averaged."""
    clients = _clients()
    server = copy.deepcopy(clients[0])
    with torch.no_grad():
        for mine, *theirs in zip(server.parameters(), *(c.parameters() for c in clients), strict=True):
            mine.copy_(torch.stack(theirs).mean(0))
    parts = [
        pictures(seed=30 + n, shift=s, scale=k)
        for n, (s, k) in enumerate(((0.0, 1.0), (1.0, 0.5), (-1.0, 1.5)))
    ]
    data = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    ratio = behind(server, data)
    symptom(ratio > 1.3, f"one client's statistics: {ratio:.2f} times the loss")
    return Case(server.eval(), batches(data))


@case("fedscale")
def _() -> Case:
    """The server builds its model anew and receives parameters only."""
    clients = _clients()
    server = cnn()
    with torch.no_grad():
        for mine, *theirs in zip(server.parameters(), *(c.parameters() for c in clients), strict=True):
            mine.copy_(torch.stack(theirs).mean(0))
    symptom(accuracy(server, pictures()) < 0.8, "poor accuracy")
    return Case(server.eval(), batches(pictures()))
