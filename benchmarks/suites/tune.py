"""Fine-tuning with frozen batch norm: ``convert(to="tune")`` beside torch's batch norm in evaluation mode.

A network of timm, random weights, batch 8, 224²; all parameters learn. Of torch's batch norms in evaluation
mode, of ``to="frozen"`` and of ``to="tune"``: the MB that a forward pass keeps for the backward pass (each
storage once, without parameters and buffers) and the seconds of a step (forward, cross-entropy, backward,
SGD; medians of interleaved steps), beside the network without any norm, which is what could be gained at
most. Before that, all gradients are compared in float64, at 64².
Where others use the machine, ``OMP_WAIT_POLICY=PASSIVE`` and ``--cpu-time`` give the time of all threads.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammabeta import convert
from gammabeta.measure.step import Step, kept_for_backward

from ..foreign.stub import import_timm
from ..harness import IncorrectError, Options, Result
from ..harness.timing import interleave

BATCH, SIZE, ROUNDS = 8, 224, 9
TUNE = 'to="tune"'
EXACT = 1e-12  # of the greatest of a tensor, in float64


def network(name: str) -> nn.Module:
    """The network in training mode, with running statistics and parameters as after some training."""
    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model(name)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.3, 0.8)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model.train()


def variants(name: str) -> dict[str, nn.Module]:
    """The same network, frozen in three ways, and without norms."""
    frozen = network(name)
    for layer in frozen.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    ours = convert(network(name), to="frozen").requires_grad_()
    return {
        "torch, in evaluation mode": frozen,
        'to="frozen"': ours,
        TUNE: convert(network(name), to="tune"),
        "no batch norm": without_norms(network(name)),
    }


def without_norms(model: nn.Module) -> nn.Module:
    """The network with nothing in the places of its norms: another function, which costs the convolutions."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, getattr(child, "act", nn.Identity()))
    return model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Cross-entropy with made-up labels."""
    return F.cross_entropy(model(x), torch.arange(len(x)))


def check(models: dict[str, nn.Module]) -> float:
    """The greatest difference of a gradient in float64, relative to the greatest of its tensor."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found = []
    for name in ("torch, in evaluation mode", TUNE):
        model = models[name].double()
        found.append(torch.autograd.grad(loss_of(model, x), list(model.parameters())))
        model.float()
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(*found[::-1], strict=True)
    )


def kept(model: nn.Module, x: Tensor) -> float:
    """MB kept for the backward pass."""
    step = Step(model, ((x,), {}), lambda output: F.cross_entropy(output, torch.arange(len(x))))
    return kept_for_backward(step) / 1e6


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()

    return step


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the suite's options."""
    parser.add_argument("--network", default="resnet50", help="of timm; %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each; %(default)s")
    parser.add_argument("--channels-last", action="store_true", help="network and images in this layout")
    parser.add_argument("--cpu-time", action="store_true", help="time of all threads together")


def run(options: Options) -> Result:
    """Compare, weigh and time them."""
    given = options.given
    batch, size, rounds = (2, 64, 2) if options.quick else (BATCH, SIZE, given.rounds)
    layout = torch.channels_last if given.channels_last else torch.contiguous_format
    models = variants(given.network)
    apart = check(models)
    if apart > EXACT:
        raise IncorrectError(f"gradients in float64 are {apart:.1e} of the greatest of their tensor apart")
    x = torch.randn(batch, 3, size, size).to(memory_format=layout)
    models = {name: nn.Module.to(model, memory_format=layout) for name, model in models.items()}  # type: ignore[call-overload]
    memory = {name: kept(model, x) for name, model in models.items()}
    steps = {name: step_of(model, x) for name, model in models.items()}
    clock = time.process_time if given.cpu_time else time.perf_counter
    times = {n: t.median for n, t in interleave(steps, rounds=rounds, round_seconds=0, clock=clock).items()}
    first = next(iter(models))
    rows = [
        {
            "case": name, "MB kept": memory[name], "less by": f"{1 - memory[name] / memory[first]:.0%}",
            "seconds a step": times[name], "times as fast": times[first] / times[name],
        }
        for name in models
    ]  # fmt: skip
    notes = [f"{given.network}, batch {batch}, {size}², float32{', channels_last' * given.channels_last}."]
    notes += ["Processor time of all threads."] * given.cpu_time
    ours = next(row for row in rows if row["case"] == TUNE)
    summary = {"kept memory less by": ours["less by"], "times as fast": ours["times as fast"]}
    return Result("Fine-tuning with frozen batch norm", rows, summary | {"gradients apart": apart}, notes)
