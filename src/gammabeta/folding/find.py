"""Find, in what flowed, the linear operations and the per-channel affine maps beside them."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..graph.record import Call, Flow, Frame, Value
from .affine import Affine, Operation

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSE = ("stride", "padding", "output_padding", "groups", "dilation")
_LINEAR: dict[Any, tuple[Operation, tuple[str, ...]]] = {F.linear: (Operation("linear", 0), ())}
for _n in (1, 2, 3):
    _LINEAR[getattr(F, f"conv{_n}d")] = (Operation("conv", _n), _CONV)
    _LINEAR[getattr(F, f"conv_transpose{_n}d")] = (Operation("conv_transpose", _n), _TRANSPOSE)
_AFTER = ("activation", "pool", "residual")  # what a fused batch norm may do after the map
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ELEMENTWISE = {
    "mul", "mul_", "multiply", "add", "add_", "sub", "sub_", "subtract", "div", "div_", "divide",
    "true_divide", "rsub", "neg", "addcmul", "addcmul_", "batch_norm", "to", "float", "double", "type_as",
}  # fmt: skip


@dataclass(eq=False)
class Linear:
    """A convolution, transposed convolution or Linear call whose weight the model holds."""

    call: Call
    op: Operation
    data: Value
    weight: Value
    bias: Value | None

    @property
    def path(self) -> str:
        """The module that called it, or the weight's own name where a larger forward did."""
        module, path = self.call.frame.module, self.call.frame.path
        if self.weight.names and not isinstance(module, _ConvNd | nn.Linear):
            return self.weight.names[0]
        return path or type(module).__name__

    @property
    def axis(self) -> int:
        """The dimension of the result that holds its channels."""
        return len(self.call.outputs[0].shape) - 1 - self.op.spatial


@dataclass(eq=False)
class Norm:
    """A per-channel affine map on dimension 1: an evaluation-mode batch norm, or what amounts to one.

    ``affine`` is None where ``why`` says it cannot be had. ``tail``: what the module does after the map (its
    activation, residual or pool).
    """

    name: str
    kind: str  # "module", "function" or "affine": a module whose operations come to one multiply-add
    path: str
    call: Call
    data: Value
    output: Value
    affine: Affine | None
    why: str = ""
    tail: bool = False

    @property
    def frame(self) -> Frame:
        """The innermost module call it happened in."""
        return self.call.frame


def is_known_norm(module: nn.Module) -> bool:
    """Tell whether a module's forward is the batch norm its attributes say, and nothing else.

    A subclass that overrides ``forward`` is opened instead, and its ``batch_norm`` call found inside.
    """
    own = type(module).forward
    if type(module).__module__.startswith("gammabeta.") and hasattr(module, "running_mean"):
        return True
    return isinstance(module, _BatchNorm) and own in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def find_linears(flow: Flow) -> dict[Call, Linear]:
    """Every linear operation whose weight is one the model holds, or computes from what it holds."""
    found = {}
    for call in flow.calls:
        if call.function not in _LINEAR or not call.outputs:
            continue
        op, names = _LINEAR[call.function]
        args = dict(zip(("input", "weight", "bias", *names), call.args, strict=False)) | call.kwargs
        data, weight, bias = args.pop("input"), args.pop("weight"), args.pop("bias", None)
        if isinstance(weight, Value) and weight.origin != "data":
            found[call] = Linear(call, Operation(op.kind, op.spatial, args), data, weight, bias)
    return found


def find_norms(flow: Flow, model: nn.Module) -> list[Norm]:
    """Every batch norm that ran, in order, and the modules that are affine in effect."""
    norms = [norm for call in flow.calls if (norm := _norm(call, model)) is not None]
    taken = {norm.call.frame for norm in norms}
    norms += [norm for frame in flow.frames if frame not in taken and (norm := _affine_module(frame, flow))]
    order = {call: i for i, call in enumerate(flow.calls)}
    return sorted(norms, key=lambda norm: order[norm.call])


def _norm(call: Call, model: nn.Module) -> Norm | None:
    if call.module is not None:
        module = call.module
        data = call.args[0] if call.args else call.kwargs.get("input")
        if not isinstance(data, Value) or not call.outputs:
            return None
        affine, why = module_affine(module)
        path = call.frame.path
        name = path or type(module).__name__
        return Norm(name, "module", path, call, data, call.outputs[0], affine, why, has_tail(module, call))
    if call.name != "batch_norm" or not call.outputs:
        return None
    args = dict(zip(_BATCH_NORM, call.args, strict=False)) | call.kwargs
    data = args.get("input", args.get("x"))
    if not isinstance(data, Value) or data.origin != "data":
        return None
    affine, why = _call_affine(args)
    tail = any(args.get(name) is not None for name in _AFTER)
    path = call.frame.path
    same = [c for c in call.frame.calls if c.name == "batch_norm"]
    index = same.index(call)
    name = (path or "forward") + ":batch_norm" + (f"[{index}]" if len(same) > 1 else "")
    owner = _owner(args.get("running_mean"), model)
    if owner is not None and owner[0] != path:  # a batch-norm module whose .forward was called directly
        return Norm(owner[0], "module", owner[0], call, data, call.outputs[0], affine, why)
    return Norm(name, "function", path, call, data, call.outputs[0], affine, why, tail)


def _owner(mean: Any, model: nn.Module) -> tuple[str, nn.Module] | None:
    if not isinstance(mean, Value) or not mean.names:
        return None
    path = mean.names[0].rpartition(".")[0]
    module = model.get_submodule(path)
    return (path, module) if is_known_norm(module) else None


def has_tail(module: nn.Module, call: Call) -> bool:
    """Tell whether a fused module does anything after the map, by its settings or in this call."""
    asked = any(call.kwargs.get(name) is not None for name in _AFTER) or len(call.args) > 1
    return asked or any(getattr(module, name, None) is not None for name in _AFTER[:2])


def module_affine(module: nn.Module) -> tuple[Affine | None, str]:
    """The map of a known batch-norm module, or why there is none."""
    mean, var = cast(Any, module).running_mean, cast(Any, module).running_var
    if mean is None or var is None:
        return None, "it keeps no running statistics, so it normalises each batch by that batch's own"
    affine = Affine.of(
        mean, var, cast(Any, module).weight, cast(Any, module).bias, float(cast(Any, module).eps)
    )
    return _checked(affine)


def _call_affine(args: dict[str, Any]) -> tuple[Affine | None, str]:
    if args.get("training", False) or args.get("running_mean") is None or args.get("running_var") is None:
        return None, "it normalises each batch by that batch's own statistics"
    numbers: list[Tensor | None] = []
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = args.get(name)
        if value is not None and (value.origin == "data" or value.tensor is None):
            return None, f"its {name} is computed from the input"
        numbers.append(None if value is None else value.tensor)
    mean, var, weight, bias = numbers
    assert mean is not None and var is not None  # noqa: PT018 - for the type checker: refused above
    return _checked(Affine.of(mean, var, weight, bias, float(args.get("eps", 1e-5))))


def _checked(affine: Affine) -> tuple[Affine | None, str]:
    if not affine.finite:
        return None, "its running statistics or parameters are not finite"
    return affine, ""


def _affine_module(frame: Frame, flow: Flow) -> Norm | None:
    """A module that multiplies and adds per channel, whatever its name: a frozen batch norm, a scale layer.

    Its calls must form one chain of element-wise arithmetic with constants; the numbers are then read off by
    running it on zeros and on ones in float64, and believed only if a random input agrees.
    """
    calls = [call for call in frame.calls if call.data]
    if not calls or len(frame.outputs) != 1 or frame.module is flow.frames[0].module or frame.reads:
        return None
    if any(call.name not in _ELEMENTWISE or len(call.data) != 1 or len(call.outputs) != 1 for call in calls):
        return None
    if any(other.parent is frame for other in flow.frames) or frame.given != (1, ()):
        return None
    data = [value for value in frame.inputs if value.origin == "data"]
    chain = [data[0] if data else None, *(call.outputs[0] for call in calls)]
    if len(data) != 1 or [call.data[0] for call in calls] != chain[:-1] or chain[-1] is not frame.outputs[0]:
        return None
    try:
        affine = _read_off(frame.module, data[0].shape)
    except Exception:  # another model's code, run in a dtype it may not expect: then it is not recognised
        return None
    if affine is None:
        return None
    return Norm(frame.path, "affine", frame.path, calls[-1], data[0], frame.outputs[0], affine)


def _read_off(module: nn.Module, shape: tuple[int, ...]) -> Affine | None:
    if len(shape) < 2:
        return None
    twin = copy.deepcopy(module).double()
    device = next((t.device for t in (*twin.parameters(), *twin.buffers())), torch.device("cpu"))
    with torch.no_grad():
        zeros = torch.zeros(1, *shape[1:], dtype=torch.float64, device=device)
        shift = twin(zeros)
        scale = twin(zeros + 1) - shift
        x = torch.linspace(-3, 5, zeros.numel(), dtype=torch.float64, device=device).view_as(zeros)
        y = twin(x)
    if y.shape != x.shape:
        return None
    flat_scale, flat_shift = (t.transpose(0, 1).flatten(1) for t in (scale, shift))
    same = torch.equal(flat_shift, flat_shift[:, :1].expand_as(flat_shift))
    affine = Affine(flat_scale[:, 0].clone(), flat_shift[:, 0].clone())
    close = torch.allclose(y, x * scale + shift, rtol=1e-9, atol=1e-9)
    steady = torch.allclose(flat_scale, flat_scale[:, :1].expand_as(flat_scale), rtol=1e-9, atol=1e-9)
    return affine if same and close and steady and affine.finite else None
