"""One small forward pass, recorded: what stands around each layer, and what the backward updates."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.layers import BatchNormLayer, batch_norm_layers
from ..graph.record import Call, Value, record, tensors_in
from ..stats.preserve import same_bits
from .evidence import Surroundings
from .static import WEIGHTED

_RELUS = {F.relu, F.relu6, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}


def surroundings(model: nn.Module, run: Callable[[], Any]) -> dict[str, Surroundings]:
    """What stands around each layer in ``run()``, a forward pass in evaluation on a few samples."""
    recording = record(model, run, lambda m: isinstance(m, (*WEIGHTED, BatchNormLayer)), kept=False)
    found: dict[str, Surroundings] = {}
    dropout: dict[Value, float] = {}  # its probability, of each value that has come through one since a norm
    direct: set[Value] = set()  # values that one has just given
    learned: set[Value] = set()  # values that something with parameters or buffers had a part in
    for call in recording.calls:
        if call.module is not None or any(v.origin == "state" or v in learned for v in call.read):
            learned.update(call.outputs)
        given = next(iter((*call.args, *call.kwargs.values())), None)
        if call.function in _DROPOUTS and not _stays_on(call):
            # In evaluation it hands back the tensor it was given.
            for value in call.outputs or call.data:
                dropout[value] = float(call.kwargs.get("p", call.args[1] if len(call.args) > 1 else 0.5))
                direct.add(value)
        elif isinstance(call.module, BatchNormLayer):
            name = call.forward.path
            if name in found:
                found[name] = replace(found[name], calls=(found[name].calls or 0) + 1)
            elif isinstance(given, Value):
                entered = _entered(given, dropout.get(given, 0.0), given in direct)
                found[name] = replace(entered, of_data=given.origin == "data" and given not in learned)
        else:
            if call.function in _RELUS and isinstance(given, Value) and given not in direct:
                norm = _norm_of(given)
                if norm is not None and norm in found:
                    found[norm] = replace(found[norm], relu_after=True)
            dropout |= dict.fromkeys(call.outputs, max((dropout.get(v, 0.0) for v in call.data), default=0.0))
    for name, layer in batch_norm_layers(model).items():
        if name in found and getattr(layer, "activation", None) in ("relu", "relu6"):
            found[name] = replace(found[name], relu_after=True)
    return found


def _stays_on(call: Call) -> bool:
    """Whether a dropout drops in evaluation, too: it then does not shift the variance between the modes."""
    return bool(call.kwargs.get("training", call.args[2] if len(call.args) > 2 else True))


def _entered(value: Value, dropout: float, direct: bool) -> Surroundings:
    """What is known of a layer at its first call."""
    producer = value.producer
    if direct or producer is None or not isinstance(producer.module, WEIGHTED):
        return Surroundings(dropout=dropout, dropout_direct=direct, calls=1)
    return Surroundings(producer.forward.path, producer.module.bias is not None, dropout=dropout, calls=1)


def _norm_of(value: Value) -> str | None:
    """The path of the batch norm that gave a value."""
    producer = value.producer
    if producer is None or not isinstance(producer.module, BatchNormLayer):
        return None
    return producer.forward.path


def updated_in_backward(model: nn.Module, run: Callable[[], Any]) -> tuple[str, ...]:
    """Names of the layers whose running statistics change while gradients are computed.

    That is what recomputation (activation checkpointing) does: the forward pass runs again during the
    backward, and updates again. The caller preserves buffers; gradients are put back here.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            outputs = [out for out in tensors(run()) if out.requires_grad]
            if not outputs:
                return ()
            before = _statistics(model)
            torch.autograd.backward(torch.stack([out.float().square().mean() for out in outputs]).sum())
            after = _statistics(model)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return tuple(
        name
        for name in before
        if not all(same_bits(a, b) for a, b in zip(before[name], after[name], strict=True))
    )


def _statistics(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of each layer's running statistics."""
    return {
        name: [t.clone() for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked) if t is not None]
        for name, bn in batch_norm_layers(model).items()
    }


def tensors(value: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, however it is nested."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
