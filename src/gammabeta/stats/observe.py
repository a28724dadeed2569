"""What each batch normalization of a model normalises: seen where it happens, and redirected on request.

Three ways lead to a normalisation, and each is watched:

- a call of PyTorch's or our layer, by ``layer(x)`` or by ``layer.forward(x)``: its input is what it is given;
- an operator of torch on the layer's running statistics, from whatever code: Python that calls
  ``F.batch_norm`` on them, a ScriptModule, an exported graph; a dispatch mode sees it, and the memory of the
  running mean says whose it is;
- arithmetic of a class's own: taken for a batch normalization of its input only where a trial shows that it
  is one (``_axis``).

The dispatch mode sends our layers to torch's operators, which costs time. So it is left out where all code
is PyTorch's or ours, and nothing but a layer's call can normalise.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm as TorchSync
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from ..functional.masked import mask_of, rows_of
from ..nn import SyncBatchNorm
from ..nn.layer import Fused
from .norms import channels, statistics
from .preserve import overwrite, preserved, uncompiled


class Use(NamedTuple):
    """How a norm shall normalise: by these statistics, or by its batch where there are none."""

    mean: Tensor | None = None
    var: Tensor | None = None


Record = Callable[[str, Any, Tensor], Use | None]
BY_BATCH = Use()
TOLERANCE = 0.05  # of the output's deviation: classes differ in the correction of the variance


class _Watched:
    """A layer's ``forward`` while it is watched; a copy that the model makes of the layer is not watched."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], own: Any) -> None:
        self.layer, self.forward, self.own = layer, forward, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        twin = copy.deepcopy(self.layer, memo)
        return MethodType(type(twin).forward, twin)


class Observer(TorchDispatchMode):
    """Calls ``record(name, layer, x)`` with each input (N, C, …) of the norms, before it is normalised.

    What ``record`` returns says how to normalise; None: as the model would. ``refused`` names the norms
    that ran in a way that could not be understood.
    """

    def __init__(self, norms: dict[str, Any], record: Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norms, self.record = norms, record
        self.refused: dict[str, str] = {}
        self.counts = dict.fromkeys(norms, 0)  # inputs recorded
        self.running: list[str | None] = []  # norms whose forward runs; None: what it does is known
        self.axes: dict[str, int] = {}  # of norms with arithmetic of their own: where the channels are
        self.opened: set[str] = set()  # norms seen to use torch's operator
        self.of_memory: dict[int, list[str]] = {}
        for name, layer in norms.items():
            kept = statistics(layer)
            if kept is not None:
                self.of_memory.setdefault(kept[0].data_ptr(), []).append(name)

    def tell(self, name: str, x: Tensor) -> Use | None:
        """Count and report an input."""
        if x.dim() < 2 or x.shape[1] != channels(self.norms[name]):
            return None  # the layer itself will say what is wrong with it
        self.counts[name] += 1
        return self.record(name, self.norms[name], x)

    # Operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if "batch_norm" not in name or "backward" in name or (self.running and self.running[-1] is None):
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        x, mean = given.get("input"), given.get("running_mean")
        owners = self.of_memory.get(mean.data_ptr(), []) if isinstance(mean, Tensor) else []
        if not owners and self.running:  # on a copy of its statistics, or on none
            owners = [name for name in self.running[-1:] if name is not None]
        if not isinstance(x, Tensor) or x.dim() < 2 or not owners:
            return func(*args, **kwargs)
        uses = [self.tell(owner, x) for owner in owners]
        if uses[0] is None:
            return func(*args, **kwargs)
        momentum, eps = 0.1, given.get("eps", given.get("epsilon", 1e-5))
        affine = given.get("weight"), given.get("bias")
        out = torch.ops.aten.native_batch_norm(x, *affine, *uses[0], uses[0].mean is None, momentum, eps)
        returns = len(func._schema.returns)
        return (*out, *(x.new_empty(0, dtype=torch.uint8),) * (returns - 3)) if returns > 1 else out[0]

    # Calls

    def attach(self, name: str, layer: nn.Module) -> Callable[[], None]:
        """Watch the layer's ``forward``; return what ends that."""
        own, inner = vars(layer).get("forward"), layer.forward
        known = own is None and _is_known(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if known:
                return self.call(name, inner, args, kwargs)
            return self.try_call(name, inner, args, kwargs)

        layer.__dict__["forward"] = _Watched(layer, forward, own)
        # Quicker ways around a layer's own call leave layers with hooks alone.
        hook = layer.register_forward_pre_hook(lambda *_: None)

        def detach() -> None:
            hook.remove()
            del layer.__dict__["forward"]
            if own is not None:
                layer.__dict__["forward"] = own

        return detach

    def call(self, name: str, inner: Any, args: Any, kwargs: Any) -> Any:
        """A call that normalises what it is given."""
        layer, x = self.norms[name], _first(args, kwargs).movedim(self.axes.get(name, 1), 1)
        mask, lengths = kwargs.get("mask"), kwargs.get("lengths")
        if isinstance(layer, Fused) and (mask is not None or lengths is not None):
            x = rows_of(x, mask_of(x, mask, lengths))
        use = self.tell(name, x)
        self.running.append(None)
        try:
            with _redirected(layer, use):
                return inner(*args, **kwargs)
        finally:
            self.running.pop()

    def try_call(self, name: str, inner: Any, args: Any, kwargs: Any) -> Any:
        """A call of a class whose ways are not known beforehand."""
        if name in self.axes:
            return self.call(name, inner, args, kwargs)
        layer, count, x = self.norms[name], self.counts[name], _first(args, kwargs)
        again = name not in self.opened and name not in self.refused and x is not None
        if again:  # with a copy: the call may overwrite its input
            rest = {key: x.clone() if value is x else value for key, value in kwargs.items()}
            copied = tuple(x.clone() if value is x else value for value in args), rest
        self.running.append(name)
        try:
            out = inner(*args, **kwargs)
        finally:
            self.running.pop()
        if self.counts[name] > count:
            self.opened.add(name)
        elif again:
            axis = self.axis(layer, inner, *copied)
            if axis is not None:
                self.axes[name] = axis
                return self.call(name, inner, *copied)
            self.refused[name] = f"{type(layer).__name__} is not known to be a batch normalization"
        return out

    def axis(self, layer: Any, inner: Any, args: Any, kwargs: Any) -> int | None:
        """Where the channels of an input are, if the class normalises by batch and by what it keeps.

        The trial: in evaluation, on the batch's own mean and variance, it gives what it gives in training.
        """
        x, kept = _first(args, kwargs), statistics(layer)
        if x is None or kept is None or x.dim() < 2:
            return None
        self.running.append(None)
        try:
            for axis in {1, int(x.dim()) - 1}:
                fits: bool = x.shape[axis] == kept[0].numel() < x.numel()
                if fits and _normalises(layer, inner, (args, kwargs), axis):
                    return axis
        except Exception:  # whatever the class does, it is none that we know
            return None
        finally:
            self.running.pop()
        return None


def _normalises(layer: Any, inner: Any, given: tuple[Any, Any], axis: int) -> bool:
    (args, kwargs), (mean, var) = given, statistics(layer) or (torch.empty(0), torch.empty(0))
    x: Tensor = _first(args, kwargs)
    with preserved(layer):

        def run(training: bool) -> Tensor:
            layer.training = training
            copies = {key: value.clone() if value is x else value for key, value in kwargs.items()}
            out: Tensor = inner(*(value.clone() if value is x else value for value in args), **copies)
            return out.double()

        wanted = run(training=True)
        spread, center = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != axis], correction=0)
        overwrite(mean, center.view_as(mean).to(mean.dtype))
        overwrite(var, spread.view_as(var).to(var.dtype))
        kept = var.clone()
        got = run(training=False)
        if got.shape != wanted.shape or float((wanted - got).abs().max()) > TOLERANCE * float(wanted.std()):
            return False
        overwrite(mean, center.view_as(mean).to(mean.dtype))
        overwrite(var, 4 * kept)
        return not torch.equal(run(training=False), got)  # it does depend on what it keeps


def _is_known(layer: nn.Module) -> bool:
    """Whether the class is PyTorch's or ours, so that a call normalises its first argument."""
    forward = type(layer).forward
    return isinstance(layer, Fused) or forward in (_BatchNorm.forward, TorchSync.forward)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


@contextmanager
def _redirected(layer: Any, use: Use | None) -> Iterator[None]:
    """Let a layer's own forward normalise as asked, by the rules of ``torch.nn.BatchNorm``'s.

    A synchronized layer in training would wait for ranks that have no more batches. Without buffers and in
    evaluation it normalises by its own batch, and takes CPU tensors, too.
    """
    if use is None:
        yield
        return
    if not isinstance(layer, _BatchNorm):
        with preserved(layer):
            layer.training = use.mean is None
            if use.mean is not None and use.var is not None:
                mean, var = statistics(layer) or (use.mean, use.var)
                overwrite(mean, use.mean.view_as(mean))
                overwrite(var, use.var.view_as(var))
            yield
        return
    before = layer.training, layer.track_running_stats, layer.running_mean, layer.running_var
    try:
        if use.mean is not None:
            layer.training, layer.running_mean, layer.running_var = False, use.mean, use.var
        elif isinstance(layer, TorchSync | SyncBatchNorm):
            layer.training, layer.running_mean, layer.running_var = False, None, None
        else:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        layer.training, layer.track_running_stats, layer.running_mean, layer.running_var = before


@contextmanager
def observed(
    model: nn.Module, norms: dict[str, Any], record: Record, run: Callable[..., Any] | None = None
) -> Iterator[Observer]:
    """Watch these norms of ``model`` while the block runs, which calls the model by ``run``, if given."""
    observer = Observer(norms, record)
    ends: list[Callable[[], None]] = []
    try:
        for name, layer in norms.items():
            if not isinstance(layer, torch.jit.ScriptModule):
                ends.append(observer.attach(name, layer))
        ours = run is None or str(getattr(run, "__module__", "")).startswith("gammabeta.")
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            if not ours or not all(map(_written_by_us, model.modules())):
                stack.enter_context(observer)
            yield observer
    finally:
        for end in ends:
            end()


def _written_by_us(module: nn.Module) -> bool:
    """Whether the class is one of ours or PyTorch's, which normalise by calls of layers alone."""
    home = type(module).__module__
    return home.startswith(("gammabeta.", "torch.nn.")) and type(module) is not nn.Module
