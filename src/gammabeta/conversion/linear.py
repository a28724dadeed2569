"""``convert(to="tune")``: the convolutions and Linears that wait for the frozen batch norm behind them."""

from typing import Any

from torch import Tensor, nn
from torch.nn import Module

from ..epilogue import NOTHING, Epilogue
from ..functional.tuned import Linear, Norm, serves, tuned
from ..nn.layer import Fused

#: Marks, among a module's attributes, that its calls may wait for a frozen batch norm: True, or what computes
#: such a call (a fold; it gives None where the rule here is to).
TUNED = "_tunes"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)}


def mark(root: Module, *, wanted: bool) -> None:
    """Mark the convolutions and Linears below ``root``, or take the marks away."""
    for module in root.modules():
        if wanted and operation_of(module) is not None:
            vars(module)[TUNED] = True
        else:
            vars(module).pop(TUNED, None)


def operation_of(module: Any) -> Linear | None:
    """The operation of a layer of torch's, with zeros around the image; None for any other module."""
    kind = type(module)
    if _FORWARDS.get(kind) is not kind.forward:  # no layer of torch's, or no longer what torch made it
        return None
    if kind is nn.Linear:
        return Linear(0)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    settings = (module.stride, module.padding, module.dilation, module.output_padding, module.groups)
    return Linear(len(module.kernel_size), kind in _TRANSPOSED, *settings)


def output_shape(module: Any, x: Tensor) -> tuple[int, ...] | None:
    """The shape of what a marked layer gives; None if it is not told here."""
    if isinstance(module, nn.Linear):
        return (*x.shape[:-1], module.out_features)
    if isinstance(module, _TRANSPOSED) or x.dim() != 2 + len(module.kernel_size):
        return None
    windows = zip(
        x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True
    )
    sides = ((side + 2 * pad - hole * (k - 1) - 1) // step + 1 for side, k, step, pad, hole in windows)
    return (x.shape[0], module.out_channels, *sides)


def run_linear(pending: Any) -> Tensor:
    """Run a waiting call of a marked layer, with the frozen batch norm and what else has joined it."""
    module, layer, x = pending.linear, pending.layer, pending.x
    if layer is None:
        return module(x)  # type: ignore[no-any-return]
    fold = vars(module)[TUNED]
    if fold is not True and (folded := fold(pending)) is not None:
        return folded  # type: ignore[no-any-return]
    operation = operation_of(module)
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    gamma, beta, mean, var = layer._tensors()
    if operation is not None and mean is not None and var is not None:
        joined = pending.activation in (None, "relu")
        norm = Norm(mean, var, layer.eps, pending.activation == "relu")
        channels = module.out_features if operation.spatial == 0 else module.out_channels
        if len(mean) == channels and serves(x, weight, norm):
            out = tuned(operation, norm, x, (weight, bias, gamma, beta), pending.residual)
            layer._check_input_dim(out)
            rest = Epilogue(None if joined else pending.activation, pending.pool)
            return rest.apply(out) if rest != NOTHING else out
    settings: dict[str, Any] = {"activation": pending.activation, "pool": pending.pool}
    return Fused.forward(layer, module(x), pending.residual, **settings)
