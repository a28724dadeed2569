"""What replaces or watches torch's own functions, before a call or around it."""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .base import IMAGE, OTHER, Base, Block
from .harness import Call, call, kind, x


class _Plain(Base):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        y = self.block(x)
        y = self.bn2(self.conv2(y)) + y
        return F.dropout(self.relu(y), 0.5, False)


@contextlib.contextmanager
def _put(owner, name, value):
    """Replace an attribute meanwhile."""
    was = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, was)


def _in(owner, name, value):
    return Call((IMAGE,), around=lambda: _put(owner, name, value), fold=False)


_BATCH_NORM, _RELU = F.batch_norm, F.relu


@kind(call(IMAGE), _in(F, "relu", lambda x, inplace=False: torch.sigmoid(x)))
class FunctionOfActivationReplaced(_Plain):
    """``nn.ReLU`` calls it too."""


@kind(call(IMAGE), _in(nn.ReLU, "forward", lambda self, x: torch.tanh(x)))
class ForwardOfActivationReplaced(_Plain):
    pass


@kind(call(IMAGE), _in(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * 0.5))
class FunctionOfDropoutReplaced(_Plain):
    pass


@kind(call(IMAGE), _in(F, "batch_norm", lambda x, *a, **k: _BATCH_NORM(x * x.abs(), *a, **k)))
class FunctionOfNormReplaced(Base):
    """The code that calls it gets what stands there."""

    def forward(self, x):
        b = self.bn
        y = F.batch_norm(x, b.running_mean, b.running_var, b.weight, b.bias, self.training)
        return F.relu(y)


@kind(call(IMAGE), _in(nn.Identity, "forward", lambda self, x: x * 3))
class ForwardOfIdentityReplaced(Base):
    def __init__(self):
        super().__init__()
        self.idle = nn.Identity()

    def forward(self, x):
        return self.relu(self.idle(self.bn(self.conv(x))))


@kind(call(IMAGE), _in(nn.MaxPool2d, "forward", lambda self, x: x[..., ::2, ::2]))
class ForwardOfPoolReplaced(Base):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


def _patched_norm():
    return _put(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: x * self.weight[0])


@kind(Call((IMAGE,), around=_patched_norm, fold=False), around=_patched_norm, never=("fold", "recalibrate"))
class ForwardOfNormReplacedBefore(_Plain):
    """What was put in place of torch's batch norm, before surgery, is what the model computes."""


class _Softer(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.relu, torch.relu, torch.relu_):
            return torch.nn.functional.softplus(args[0])
        return func(*args, **(kwargs or {}))


@kind(call(IMAGE), Call((IMAGE,), around=_Softer, fold=False))
class FunctionModeReplacesRelu(_Plain):
    pass


class _Counts(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        out = func(*args, **(kwargs or {}))
        return out * 2 if "relu" in func.__name__ else out


@kind(call(IMAGE), Call((IMAGE,), around=lambda: _Counts([]), fold=False))
class DispatchModeDoublesRelu(_Plain):
    pass


@kind(
    call(IMAGE),
    Call((IMAGE,), around=lambda: saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)),
    Call((IMAGE,), around=lambda: torch.autograd.graph.save_on_cpu()),
    slow=True,
)
class SavedTensorsElsewhere(_Plain):
    pass


def _threads(model, x):
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(model, [x, x * 2, x * 3]))


@kind(call(IMAGE), Call((IMAGE,), run=_threads), modes=(False,))
class CalledFromThreads(_Plain):
    pass


@kind(call(IMAGE), call(OTHER))
class ThreadLocal(Base):
    local = threading.local()

    def forward(self, x):
        self.local.y = self.bn(self.conv(x))
        self.local.depth = getattr(self.local, "depth", 0) + 1
        y = self.relu(self.local.y)
        self.local.depth -= 1
        return y * (1 + self.local.depth)


@kind(
    call(IMAGE),
    call(x(0, 3, 6, 6)),
    Call((IMAGE,), run=lambda m, v: m(v.transpose(2, 3))),
    Call((IMAGE,), run=lambda m, v: m(v[:1].expand(4, -1, -1, -1))),
    Call((IMAGE,), run=lambda m, v: m(v[..., ::2, 1:])),
    Call((IMAGE,), run=lambda m, v: m(v.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))),
    Call((IMAGE,), run=lambda m, v: m(v.flatten()[3 : -(4 * 108 - 3 - 324)].view(3, 3, 6, 6))),
    Call((IMAGE,), run=lambda m, v: m(nn.Parameter(v.detach()))),
    never=("fold", "recalibrate"),
)
class StrangeInputs(Base):
    """Sizes, strides and types that a norm may meet first, or refuse."""

    def forward(self, x):
        return self.relu(self.bn(x) + 0.5)


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, v: m(v.float())),
    Call((IMAGE,), run=lambda m, v: m(v[0])),
    Call((IMAGE,), run=lambda m, v: m(v[:1, :, :1, :1])),
    Call((IMAGE,), run=lambda m, v: m(v[:, :2])),
    Call((IMAGE,), run=lambda m, v: m(torch.zeros(2, 3, 4, 4, dtype=torch.int64))),
    Call((IMAGE,), run=lambda m, v: m(v.numpy(force=True))),
    Call((IMAGE,), run=lambda m, v: m(v.to_sparse())),
    Call((IMAGE,), run=lambda m, v: m(torch.complex(v, v))),
    never=("fold", "recalibrate"),
    modes=(False,),  # in training, torch counts a batch before it refuses it
)
class RefusedInputs(StrangeInputs):
    """The same kind of error, or the same numbers."""


def _doubled(model, x):
    out = model(x)
    out.mul_(2).add_(1)
    return out


class _Activated(Base):
    """The caller writes into what it was given; what a backward pass needs must not be that."""

    def __init__(self, act, add=False):
        super().__init__()
        self.act, self.add = act, add

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.add:
            y = y + x
        return self.act(y)


for _name, _made in {
    "leaky_relu": nn.LeakyReLU(0.2),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(),
    "mish": nn.Mish(),
    "elu": nn.ELU(),
    "hardtanh": nn.Hardtanh(),
    "hardsigmoid": nn.Hardsigmoid(),
    "relu6": nn.ReLU6(),
    "identity": nn.Identity(),
    "prelu": nn.PReLU(3),
    "max_pool": nn.MaxPool2d(2),
    "mean_pool": nn.AvgPool2d(2),
}.items():

    def _build(made=_made):
        return _Activated(copy.deepcopy(made))

    _build.__name__ = f"caller_writes_into_{_name}"
    _slow = _name not in ("silu", "max_pool")
    kind(call(IMAGE), Call((IMAGE,), run=_doubled), never=("fold", "recalibrate"), slow=_slow)(_build)


@kind(
    call(IMAGE),
    Call((IMAGE,), run=lambda m, v: torch.autograd.grad(m(v).pow(2).sum(), v, create_graph=True)[0]),
    Call((IMAGE,), run=lambda m, v: torch.func.vjp(m, v)[0]),
    Call((IMAGE,), run=lambda m, v: torch.func.grad(lambda t: m(t).pow(2).sum())(v)),
    Call((IMAGE[:2, :, :2, :2],), run=lambda m, v: torch.func.jacrev(lambda t: m(t).sum((2, 3)))(v)),
    Call((IMAGE,), run=lambda m, v: torch.func.functional_call(m, {"bn2.weight": m.bn2.weight * 2}, (v,))),
    never=("fold", "recalibrate"),
    modes=(False,),
    slow=True,
)
class Derivatives(_Plain):
    pass


def _exported(model, x):
    return torch.export.export(model, (x.detach(),)).module()(x)


def _compiled(model, x):
    torch._dynamo.reset()
    try:
        return torch.compile(model, backend="aot_eager")(x)
    finally:
        torch._dynamo.reset()


@kind(
    call(IMAGE),
    Call((IMAGE,), run=_compiled),
    Call((IMAGE,), run=_exported),
    never=("fold", "recalibrate"),
    modes=(False,),
    slow=True,
)
class CompiledAndExported(_Plain):
    pass


@kind(call(IMAGE), Call((IMAGE,), run=lambda m, v: np.asarray(m(v).detach())))
class ToNumpy(_Plain):
    pass
