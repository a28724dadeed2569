"""Each fault that the doctor knows, injected into a healthy model the way it happens in life.

A fault takes an independent copy of a subject and returns it ill, or None where the fault does not apply.
``implies`` names the checks that may rightly fire as well: stale statistics also open a gap, for instance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gammabeta.doctor import Severity
from gammabeta.nn import FrozenBatchNorm2d

from .layers import AlwaysUpdating, Checkpointed, NotebookBatchNorm, statistics
from .subjects import TRAINED, Subject, cnn, digits, mlp, train

Inject = Callable[[Subject, int], Subject | None]
STALE = frozenset({"train-eval-gap", "statistics-drift"})


@dataclass(frozen=True)
class Fault:
    """What is injected, which check must fire, how severely, and which others may."""

    name: str
    check: str
    severity: Severity
    inject: Inject
    implies: frozenset[str]


FAULTS: list[Fault] = []


def fault(name: str, check: str, severity: Severity, *implies: str) -> Callable[[Inject], Inject]:
    """Register an injection."""

    def register(inject: Inject) -> Inject:
        FAULTS.append(Fault(name, check, severity, inject, frozenset(implies)))
        return inject

    return register


def live_layers(model: nn.Module) -> list[_BatchNorm]:
    """The layers that are not frozen by class."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, FrozenBatchNorm2d)]


def pick(subject: Subject, seed: int) -> _BatchNorm | None:
    """One layer, another for each seed."""
    layers = live_layers(subject.model)
    return layers[seed % len(layers)] if layers else None


def some(channels: int) -> int:
    """Three channels in ten, at least two."""
    return max(2, round(0.3 * channels))


def swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` where ``old`` is."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)


def run_batches(subject: Subject, count: int) -> None:
    """Some forward passes in training, which update statistics and nothing else."""
    modes = [(module, module.training) for module in subject.model.modules()]
    subject.model.train()
    with torch.no_grad():
        for inputs, _ in (subject.loader() * count)[:count]:
            subject.model(inputs)
    for module, training in modes:
        module.training = training


@fault("a layer's statistics were reset", "never-updated", "error", *STALE, "unequal-updates")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    layer.reset_running_stats()
    return subject


@fault("five updates from the start", "init-residue", "error", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    layers = live_layers(subject.model)
    for layer in layers:
        layer.reset_running_stats()
    run_batches(subject, 5)
    return subject if layers else None


@fault("activation checkpointing around a layer", "double-update", "warning", "unequal-updates")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None or subject.name == "fused cnn":  # our layers skip the second update
        return None
    swap(subject.model, layer, Checkpointed(layer))
    return subject


@fault("a layer restored from an older checkpoint", "unequal-updates", "warning")
def _(subject: Subject, seed: int) -> Subject | None:
    layers = live_layers(subject.model)
    if len(layers) < 3:
        return None
    older = layers[1 + seed % (len(layers) - 1)]  # not the first, which stands apart from the blocks
    statistics(older)[2].floor_divide_(2)
    return subject


@fault("NaN, infinity or a negative value", "invalid-statistics", "error", *STALE, "collapsed-variance")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    mean, var, _ = statistics(layer)
    (mean if seed % 2 else var)[0] = (float("nan"), float("inf"))[seed % 2]
    if seed % 3 == 2:
        var[0] = -1.0
    return subject


@fault("running variances near zero", "collapsed-variance", "warning", *STALE, "batch-dependence")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    statistics(layer)[1][: some(layer.num_features)] = 1e-8
    return subject


@fault("one running variance beyond float16", "exploding-variance", "warning", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    statistics(layer)[1][0] = 1e6
    return subject


@fault("γ next to zero", "dead-gamma", "warning", "dead-input", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None or layer.weight is None:
        return None
    with torch.no_grad():
        layer.weight[: some(layer.num_features)] *= 1e-8
    return subject


@fault("β far below zero before a ReLU", "dead-gamma", "warning", "dead-input", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None or layer.bias is None or subject.name == "discriminator":  # leaky: never off
        return None
    if subject.name == "residual" and layer is not live_layers(subject.model)[0]:
        return None  # an addition stands between the blocks' second layers and their ReLU
    with torch.no_grad():
        layer.bias[: some(layer.num_features)] = -10 * layer.weight.abs().max()
    return subject


@fault("another framework's momentum", "momentum", "warning", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    layers = live_layers(subject.model)
    for layer in layers:
        layer.momentum = (0.9, 0.99, 0.9, 0.0, 1.0)[seed % 5]
    run_batches(subject, 20)
    return subject if layers else None


@fault("momentum None over uneven batches", "momentum", "warning", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    layers = live_layers(subject.model)
    for layer in layers:
        layer.momentum = None
    return subject.copy(uneven=(128, 16, 16, 16, 128, 16)) if layers else None


@fault("weights from Keras, eps left behind", "eps", "warning")
def _(subject: Subject, seed: int) -> Subject | None:
    return subject.copy(source="keras")


@fault("eps of zero", "eps", "error")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    layer.eps = 0.0
    return subject


@fault("the model cast to bfloat16", "half-precision-buffers", "warning", "statistics-drift")
def _(subject: Subject, seed: int) -> Subject | None:
    if subject.name == "3-D":  # PyTorch's AvgPool3d has no bfloat16 on the CPU
        return None
    subject.model.bfloat16()
    return subject


@fault("a bias before batch normalization", "redundant-bias", "note", "unequal-updates")
def _(subject: Subject, seed: int) -> Subject | None:
    before = [
        module
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) and module.bias is None
    ]
    if not before or subject.name == "frozen":
        return None
    module = before[seed % len(before)]
    if isinstance(module, nn.Linear) and subject.name == "generator":
        module = before[-1]  # a reshaping stands between its linear layer and the normalization
    module.bias = nn.Parameter(torch.zeros(module.weight.shape[int(isinstance(module, nn.ConvTranspose2d))]))
    return subject


@fault("one parameter group with weight decay", "weight-decay-on-affine", "note")
def _(subject: Subject, seed: int) -> Subject | None:
    if not any(layer.weight.requires_grad for layer in live_layers(subject.model)):
        return None
    subject.optimizer = torch.optim.SGD(subject.model.parameters(), lr=0.1, weight_decay=5e-4)
    return subject


@fault("γ and β frozen, statistics not", "partly-frozen", "warning")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    subject.model.train()
    layer.requires_grad_(False)
    return subject


@fault("a layer left in training mode", "partly-frozen", "error")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    layer.train()
    return subject


@fault("track_running_stats switched off afterwards", "tracking-toggled", "error")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    layer.track_running_stats = False
    return subject


@fault("dropout before a layer, in training", "dropout-before-bn", "warning", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    layers = live_layers(subject.model)
    if subject.name not in ("mlp", "cnn", "fused cnn", "3-D"):
        return None
    layer = layers[-1]
    swap(subject.model, layer, nn.Sequential(nn.Dropout(0.5), layer))
    run_batches(subject, 60)
    return subject


@fault("one sample more than full batches", "last-batch-of-one", "note")
def _(subject: Subject, seed: int) -> Subject | None:
    return subject.copy(uneven=(64, 64, 64, 1))


@fault("statistics of other weights", "statistics-drift", "warning", "train-eval-gap")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    mean, var, _ = statistics(layer)
    if seed % 2:
        mean.add_(var.sqrt() * 1.5)
    else:
        var.mul_(8.0)
    return subject


@fault("trained on pixels in [0, 1], served [0, 255]", "train-eval-gap", "warning", "statistics-drift")
def _(subject: Subject, seed: int) -> Subject | None:
    if subject.name in ("generator", "discriminator", "frozen"):
        return None
    return subject.copy(inputs=subject.inputs * 255)


@fault("two domains, each in batches of its own", "train-eval-gap", "warning", "non-iid-batches", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    if subject.name not in ("mlp", "cnn"):
        return None
    torch.manual_seed(2000 + seed)
    images, labels = digits()
    both, twice = torch.cat([images, 0.2 - 0.2 * images]), torch.cat([labels, labels])
    domain = torch.arange(len(both)) // len(images)
    learned = torch.arange(len(both)) % len(images) < TRAINED
    model = mlp() if subject.name == "mlp" else cnn()
    optimizer = train(model, both[learned], twice[learned], groups=domain[learned])
    model.eval()
    held_out = torch.arange(int((~learned).sum()))
    return Subject(subject.name, model, both[~learned], twice[~learned], order=held_out, optimizer=optimizer)


@fault("the notebook: evaluation updates statistics", "eval-mutates", "error", "batch-dependence")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    if seed % 2 and isinstance(layer, nn.BatchNorm2d):
        new: nn.Module = AlwaysUpdating(layer.num_features)
        new.load_state_dict(layer.state_dict())
        swap(subject.model, layer, new.eval())
    else:
        swap(subject.model, layer, NotebookBatchNorm(layer).eval())
    return subject


@fault("no running statistics", "batch-dependence", "warning", "train-eval-gap")
def _(subject: Subject, seed: int) -> Subject | None:
    layer = pick(subject, seed)
    if layer is None:
        return None
    layer.track_running_stats = False
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return subject


@fault("batches of four", "tiny-batch", "warning", "train-eval-gap")
def _(subject: Subject, seed: int) -> Subject | None:
    return subject.copy(batch=4) if live_layers(subject.model) else None


@fault("data in order of class", "non-iid-batches", "warning", *STALE)
def _(subject: Subject, seed: int) -> Subject | None:
    if subject.targets is None:
        return None
    return subject.copy(order=subject.targets.argsort(stable=True))


@fault("channels of zero weight", "dead-input", "warning", "statistics-drift", "train-eval-gap")
def _(subject: Subject, seed: int) -> Subject | None:
    weighted = [
        m
        for m in subject.model.modules()
        if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear) and m.bias is None
    ]
    if not weighted:
        return None
    module = weighted[seed % len(weighted)]
    with torch.no_grad():
        module.weight[: some(len(module.weight))] = 0.0
    return subject
