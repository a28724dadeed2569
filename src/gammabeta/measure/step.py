"""One training step of a model, without the optimiser, and what is measured of it beside its time."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..graph.record import Inputs, tensors_in

# torch's operators that normalise by a batch's statistics or by running ones, forward and backward.
_NORMS = ("batch_norm", "batch_norm_backward")


def mean_square(output: Any) -> Tensor:
    """Return the summed mean squares of an output's differentiable tensors: a loss for any model."""
    parts = [t.float().square().mean() for t in tensors_in(output) if t.requires_grad]
    if not parts:
        raise UsageError("no output of the model depends on a parameter that learns: give training=False")
    return torch.stack(parts).sum()


class Step:
    """Forward, loss and backward, of a model in whatever mode it is in; calling it makes one."""

    def __init__(self, model: nn.Module, inputs: Inputs, loss: Callable[[Any], Tensor] | None) -> None:
        self.model, self.inputs, self.loss = model, inputs, loss or mean_square

    def forward(self) -> tuple[Any, Tensor]:
        """Return the output and the loss."""
        args, kwargs = self.inputs
        output = self.model(*args, **kwargs)
        return output, self.loss(output)

    def __call__(self) -> None:
        """Leave the gradients in the parameters."""
        self.model.zero_grad(set_to_none=True)
        self.forward()[1].backward()
        synchronize(self.model)


def synchronize(model: nn.Module) -> None:
    """Wait for a model's GPU, if it is on one."""
    if any(parameter.is_cuda for parameter in model.parameters()):
        torch.cuda.synchronize()


def kept_for_backward(step: Step) -> int:
    """Return the bytes that a forward pass keeps for the backward pass.

    Each storage counts once; parameters and buffers, which are there anyway, do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = step.forward()
    del kept
    return sum(found.values())


def share_of_batch_norm(step: Step) -> float | None:
    """Return the part of a step's time that torch's own batch norm takes, forward and backward, 0 to 1.

    None where the step has none of torch's, but another library's.

    The time is that of the operators themselves, as torch's profiler counts it: on a GPU if the model is on
    one.
    """
    step()
    gpu = any(parameter.is_cuda for parameter in step.model.parameters())
    with _quiet_profiler(), torch.autograd.profiler.profile(use_device="cuda" if gpu else None) as found:
        step()
    times = {
        event.key: float(event.self_device_time_total if gpu else event.self_cpu_time_total)
        for event in found.key_averages()
    }
    norms = sum(time for key, time in times.items() if _is_norm(key))
    return norms / sum(times.values()) if norms else None


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Let torch's profiler write nothing of its own to standard error, at its first use in a process."""
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        yield
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]


def _is_norm(operator: str) -> bool:
    name = operator.rpartition("::")[2]
    return name.endswith(_NORMS) or "batch_norm_legit" in name
