"""One training or evaluation step: choose the path of a call, then run it.

``route`` decides and gives its reason; ``train``, ``evaluate`` and ``explain`` all ask it. The modules
and ``batch_norm`` call ``train`` and ``evaluate``.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..epilogue import NOTHING, Epilogue, Pool, pool_by_torch
from ..errors import UnavailableError, UsageError
from ..kernels import backend as backends
from ..kernels.backend import Backend, Call, Normalized, Running, unfit
from ..kernels.layout import readable
from ..kernels.tensors import enter
from . import autograd

_TYPES = (Tensor, Parameter)
_NUMBERS = (float, int, torch.SymFloat, Tensor)

# Elements up to which torch's operators are quicker than a kernel and the Python around it: with nothing to
# fuse, with one thing, with more. Measured; see docs/design/modules.md.
SMALL_TRAIN = [98304, 98304, 65536]
SMALL_EVAL = [1 << 20, 1 << 18, 1 << 16]

# --- which path -------------------------------------------------------------------------------------------


class Route(NamedTuple):
    """The path of a call.

    ``kind``: "kernels" (of ``backend``, on ``call``, whose tensors they can read), "graph" (the operators of
    ``library``), "torch", or "refused": torch refuses the call or treats it as a special case, so it is left
    to torch. ``left`` is left to torch's operators afterwards.
    """

    kind: str
    call: Call
    reason: str
    name: str = "torch"  # of the backend
    backend: Any = None  # a Backend
    left: Epilogue = NOTHING


def route(call: Call, running: Running, training: bool, backend: str) -> Route:
    """The path that a call takes, and why.

    Raises:
        UnavailableError: a backend was named and cannot serve the call.
    """
    if irregular(call, running, training):
        reason = "torch refuses these arguments, or treats them as a special case (an empty input)"
        return Route("refused", call, reason)
    # Max pooling in the kernels is for eager execution on a CPU, and so are activations with numbers, where
    # a graph has them too. Elsewhere torch's operators follow the kernels.
    away = not call.x.is_cpu or backend == "gpu"
    kept, left = call.epilogue.parted(numbers=away, windows=away or torch.compiler.is_compiling())
    if left is not NOTHING:
        # Written out here and below: PyTorch 2.6 traces neither _replace nor a slice of a named tuple.
        call = Call(call.x, call.weight, call.bias, call.residual, kept, call.eps)
    if backend == "torch":
        return Route("torch", call, "backend='torch' was asked for", left=left)
    choose = choose_operators if torch.compiler.is_compiling() else choose_kernels
    found = choose(call, backend)
    if isinstance(found, str):
        if backend != "auto":
            raise UnavailableError(f"backend={backend!r} cannot run this call: {found}; use backend='auto'")
        return Route("torch", call, found, left=left)
    return Route(found.kind, found.call, found.reason, found.name, found.backend, left)


def choose_kernels(call: Call, backend: str) -> Route | str:
    """The route through a backend's kernels, or why there is none."""
    x, _, _, residual, epilogue, _ = call
    why = traced(x) or unfit(x, residual, epilogue.pool)
    if why is not None:
        return why
    device = "cpu" if x.is_cpu else x.device.type
    name = backends.for_device(device) if backend == "auto" else backend
    if name is None:
        return f"there is no kernel for device {device!r}"
    kernels = backends.load(name)
    if isinstance(kernels, str):
        return kernels
    if residual is not None or not x.is_contiguous():
        call = readable(call)
    why = kernels.unsupported(call.x, call.residual, epilogue)
    if why is not None:
        return str(why)
    reason = "chosen for this device and dtype" if backend == "auto" else "asked for by name"
    return Route("kernels", call, reason, name, kernels)


# PyTorch 2.6 does not tell that torch.export traces: there a program holds our operators.
_exporting = getattr(torch.compiler, "is_exporting", bool)


def choose_operators(call: Call, backend: str) -> Route | str:
    """The same while ``torch.compile`` traces: the operators of ``library``, or why not.

    Reads nothing but metadata and loads nothing, so that it can be traced; the operator finds its kernels
    when it runs. An exported program holds torch's operators only: it must run where this package is not.
    """
    if _exporting():
        return "torch.export is tracing; the program must run without this package"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active; torch's operators can be transformed"
    x = call.x
    why = unfit(x, call.residual, call.epilogue.pool)
    if why is not None:
        return why
    device = x.device.type
    name = backends.GRAPHS.get(device)
    if name is None or backend not in ("auto", name) or (device == "cpu" and x.dtype is torch.float16):
        return f"there is no kernel for {x.dtype} on {device!r} here"
    return Route("graph", readable(call), "torch.compile is tracing", name, None, NOTHING)


def traced(x: Tensor) -> str | None:
    """Why this call is not plain eager execution on a plain tensor, or None if it is."""
    if type(x) not in _TYPES:
        return f"the input is a {type(x).__name__}, which only torch's operators take"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active; torch's operators can be transformed"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active; torch's operators have the rule for it"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active and must see torch's operators"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing and must see torch's operators"
    return None


def is_small(call: Call, training: bool) -> bool:
    """Whether torch's operators are quicker for this eager call on the CPU, because it is small."""
    x, _, _, residual, (activation, pool), _ = call
    size = x.numel()
    extras = (residual is not None) + (activation is not None) + (pool is not None)
    if size > (SMALL_TRAIN if training else SMALL_EVAL)[extras if extras < 2 else 2] or size == 0:
        return False
    return not torch.compiler.is_compiling() and x.is_cpu and traced(x) is None


def irregular(call: Call, running: Running, training: bool) -> bool:
    """Whether ``torch.nn.functional.batch_norm`` refuses this call, or treats it as a special case.

    Such a call goes to torch, whatever backend is named, so that its errors are torch's own.
    """
    x, weight, bias, _, _, eps = call
    running_mean, running_var, momentum, _ = running
    if x.dim() < 2 or x.numel() == 0:
        return True
    channels = x.shape[1]
    if training:
        if x.numel() == channels or eps <= 0.0 or (running_mean is None) != (running_var is None):
            return True
    elif running_mean is None or running_var is None or eps < 0.0:
        return True
    if not isinstance(momentum, _NUMBERS):
        return True
    storage, device, on_cpu = x.dtype, x.device, x.is_cpu
    kind = None
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.numel() != channels:
            return True
        if tensor.is_cpu is not on_cpu or not (on_cpu or tensor.device == device):
            return True
        if kind is None:
            kind = tensor.dtype
            if kind is not storage and kind is not torch.float32:
                return True
        elif tensor.dtype is not kind:
            return True
    return False


def check_call(x: Tensor, pool: Pool, backend: str = "auto") -> None:
    """Refuse a pool or a backend that this call cannot have.

    Raises:
        UsageError: pooling of an input that is not 4D, or a backend that does not exist.
    """
    if pool is not None and x.dim() != 4:
        raise UsageError(f"pool={pool} needs a 4D input (N, C, H, W), got {x.dim()}D input")
    known = ("auto", *backends.names(), "torch")
    if backend not in known:
        raise UsageError(f"backend must be one of {', '.join(known)}; got {backend!r}")


# --- torch's own path -------------------------------------------------------------------------------------
#
# ``F.batch_norm`` and what follows it, one operator after the other. It serves every dtype, device, tensor
# subclass and transform; autograd, ``torch.func`` and ``torch.export`` see nothing but ATen operators.


def _torch_batch_norm(call: Call, running: Running, training: bool) -> Tensor:
    """Exactly ``F.batch_norm``, running statistics included, then the epilogue."""
    x, weight, bias, residual, epilogue, eps = call
    momentum: float = running.factor  # type: ignore[assignment]
    out = F.batch_norm(x, running.mean, running.var, weight, bias, training, momentum, eps)
    return epilogue.apply(out, residual)


def _torch_with_statistics(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the batch's own statistics and return them: ``(out, mean, unbiased var)``.

    ``F.batch_norm`` gives its statistics away only as running ones: with momentum 1 those are the batch's.
    """
    x, weight, bias, residual, epilogue, eps = call
    kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    if weight is not None:
        kind = weight.dtype
    elif bias is not None:
        kind = bias.dtype
    mean = torch.zeros(x.shape[1], dtype=kind, device=x.device)
    var = torch.zeros(x.shape[1], dtype=kind, device=x.device)
    out = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    return epilogue.apply(out, residual), mean, var


def _epilogue_in_place(out: Tensor, call: Call) -> Tensor:
    """The epilogue in the memory of ``out``, which nothing else reads, where autograd and shapes allow it."""
    residual, (activation, pool) = call.residual, call.epilogue
    if residual is None and pool is None:
        if activation is None:
            return out
        return out.relu_() if activation == "relu" else call.epilogue.apply(out)
    if isinstance(residual, Tensor) and residual.shape == out.shape and residual.dtype is out.dtype:
        out += residual
        residual = None
    if activation == "relu" and residual is None:
        out, activation = out.relu_(), None
    if activation is None and residual is None:
        return pool_by_torch(out, pool)
    return Epilogue(activation, pool).apply(out, residual)


# --- training ---------------------------------------------------------------------------------------------


def train(call: Call, running: Running, backend: str = "auto") -> tuple[Tensor, bool | Tensor]:
    """Normalise with the batch's statistics and update the running ones, if there are any.

    Returns:
        The output, and whether the batch was counted: a bool, or a boolean tensor where reading it would
        make a device wait.
    """
    if backend == "auto" and is_small(call, True) and not isinstance(running.factor, Tensor):
        return _train_small(call, running)
    kind, call, _, _, kernels, left = route(call, running, True, backend)
    if kind == "refused":
        factor = 1.0 if isinstance(running.factor, Tensor) else running.factor
        return _torch_batch_norm(call, running._replace(factor=factor), True), True
    if kind == "torch":
        transformed = torch._C._are_functorch_transforms_active()
        out, accepted = (_train_transformed if transformed else _train_by_torch)(call, running)
        return left.apply(out), accepted
    out, mean, var = _normalise(kind, kernels, call)
    out = left.apply(out)
    if running.mean is None or running.var is None:
        return out, True
    count = call.x.numel() // call.x.shape[1]
    return out, update_running(kernels, running, mean, var, count)


def update_running(
    kernels: Backend | None, running: Running, mean: Tensor, var: Tensor, count: int
) -> bool | Tensor:
    """Enter a batch of ``count`` values a channel (``var`` biased), by the kernel where it can."""
    if kernels is None or isinstance(running.factor, Tensor):
        return enter(running, mean, var * (count / (count - 1)))
    return kernels.update_running(running, mean, var, count)


def with_statistics(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the batch's statistics: ``(out, mean, unbiased var)``, the last two without gradient."""
    kind, call, _, _, kernels, left = route(call, Running(None, None), True, "auto")
    if kind in ("refused", "torch"):
        out, mean, var = _torch_with_statistics(call)
        return left.apply(out), mean, var
    out, mean, var = _normalise(kind, kernels, call)
    count = call.x.numel() // call.x.shape[1]
    return left.apply(out), mean, var * (count / (count - 1))


def _normalise(kind: str, kernels: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, mean, biased var)`` by kernels, called directly or as an operator in a graph."""
    if kind == "kernels":
        return autograd.train(kernels, call)
    x, weight, bias, residual, (activation, pool), eps = call
    operator: Any = torch.ops.gammabeta.batch_norm_train
    out, mean, var, _ = operator(x, weight, bias, residual, eps, activation, pool)
    return out, mean, var


def _train_small(call: Call, running: Running) -> tuple[Tensor, bool | Tensor]:
    """A small input on the CPU: torch's operator, with as little around it as possible."""
    x, weight, bias, _, _, eps = call
    running_mean, running_var, _, skip_nonfinite = running
    factor: float = running.factor  # type: ignore[assignment]
    if x.numel() == x.shape[1] or eps <= 0.0:
        F.batch_norm(x, running_mean, running_var, weight, bias, True, factor, eps)  # raises
    if running_mean is None or running_var is None or not skip_nonfinite:
        out = torch.batch_norm(x, weight, bias, running_mean, running_var, True, factor, eps, False)
        return _epilogue_in_place(out, call), True
    if running_mean.dtype is not torch.float32:
        return _train_by_torch(call, running)  # the batch's own statistics would be rounded on the way
    # With momentum 1 torch leaves the batch's own statistics, the variance unbiased already.
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    out = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, False)
    kernels = backends.load("cpu")
    if isinstance(kernels, str):
        accepted = enter(running, mean, var)
    else:  # one short call instead of ten; what is unbiased already needs the correction of endless values
        accepted = kernels.update_running(running, mean, var, 1 << 53)
    return _epilogue_in_place(out, call), accepted


def _train_by_torch(call: Call, running: Running) -> tuple[Tensor, bool | Tensor]:
    """The same through torch's operators; the running statistics are torch's own to the last bit."""
    running_mean, running_var, factor, skip_nonfinite = running
    if running_mean is None or running_var is None:
        return _torch_batch_norm(call, Running(None, None), True), True
    if isinstance(factor, Tensor):
        out, mean, var = _torch_with_statistics(call)
        return out, enter(running, mean, var)
    if not skip_nonfinite:
        return _torch_batch_norm(call, running, True), True
    new_mean, new_var = running_mean.clone(), running_var.clone()
    out = _torch_batch_norm(call, Running(new_mean, new_var, factor), True)
    with torch.no_grad():
        accepted = torch.isfinite(new_mean).all() & torch.isfinite(new_var).all()
        running_mean.copy_(torch.where(accepted, new_mean, running_mean))
        running_var.copy_(torch.where(accepted, new_var, running_var))
    return out, accepted


def _train_transformed(call: Call, running: Running) -> tuple[Tensor, bool | Tensor]:
    """The same under a transform of ``torch.func``, which may forbid running statistics to be updated."""
    try:
        return _train_by_torch(call, running)
    except RuntimeError as error:
        if running.mean is None:
            raise
        raise UnavailableError(
            "a batch norm in training updates its running statistics, which this torch.func transform (vmap, "
            "jacrev, grad) forbids: pass buffers through functional_call, call eval(), or replace batch norm "
            'with gb.convert(model, to="group", fit=loader)'
        ) from error


# --- evaluation -------------------------------------------------------------------------------------------


def _kept(x: Tensor, *statistics: Tensor | None) -> list[Tensor | None]:
    """Copies, if a backward pass may need them: a training step in between updates them in place."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or traced(x) is not None:
        return list(statistics)
    return [None if one is None else one.clone() for one in statistics]


def constants(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(mean, invstd)`` as kernels take them; copies, since a training step may come before the backward."""
    with torch.no_grad():
        mean = running_mean.to(torch.float32, copy=True)
        return mean, (running_var.to(torch.float32) + eps).rsqrt()


def evaluate(
    call: Call, running_mean: Tensor | None, running_var: Tensor | None, backend: str = "auto"
) -> Tensor:
    """Normalise with the running statistics, which are constants."""
    if backend == "auto" and is_small(call, False):
        x, weight, bias, _, _, eps = call
        if eps < 0.0:
            F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)  # raises
        running_mean, running_var = _kept(x, running_mean, running_var)
        out = torch.batch_norm(x, weight, bias, running_mean, running_var, False, 0.0, eps, False)
        return _epilogue_in_place(out, call)
    running = Running(running_mean, running_var)
    kind, call, _, _, kernels, left = route(call, running, False, backend)
    if kind in ("refused", "torch") or running_mean is None or running_var is None:
        mean, var = _kept(call.x, running_mean, running_var)
        return left.apply(_torch_batch_norm(call, Running(mean, var), False))
    mean, invstd = constants(running_mean, running_var, call.eps)
    if kind == "kernels":
        return left.apply(autograd.apply(kernels, Normalized(call, mean, invstd)))
    x, weight, bias, residual, epilogue, _ = call
    operator: Any = torch.ops.gammabeta.batch_norm_apply
    out = operator(x, mean, invstd, weight, bias, residual, *epilogue)
    return left.apply(out)
