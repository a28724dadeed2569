"""What a kind is: a model with all that a fault of surgery would show on, and how two models are compared.

A kind is a small model and some calls. The first call is the example that surgery may see. The others are
those on which a model that was rewritten from what the example showed would be wrong. Everything is in
float64, so that only rounding may differ.
"""

import contextlib
import copy
import dataclasses
import enum
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TOLERANCE = 1e-9  # relative to the largest value of a tensor; sums in another order
_OF_TORCH = set(vars(nn.Module()))
_OF_DYNAMO = ("_torchdynamo", "_dynamo", "get_compiler_config")


def no_change(_model: nn.Module) -> None:
    """Leave a model as it is."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a model.

    ``before`` does something to the model first: what a user may do to it after surgery. ``run(model, *args,
    **kwargs)`` makes the call, by default that of the model itself. ``fold``: whether a folded model promises
    the same (its batch norms are gone, so that nobody can hang a hook on them). ``around`` is a context.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: Callable[[nn.Module], object] = no_change
    run: Callable[..., Any] | str = "__call__"
    fold: bool = True
    around: Callable[[], Any] = contextlib.nullcontext

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if callable(self.run):
            return self.run(model, *args, **kwargs)
        return (model if self.run == "__call__" else getattr(model, self.run))(*args, **kwargs)


def call(*args: Any, **kwargs: Any) -> Call:
    """A plain call with these arguments."""
    return Call(args, kwargs)


@dataclasses.dataclass(frozen=True, repr=False)
class Kind:
    """A model, its calls, and what may be said of it.

    ``reset`` puts back what the model keeps outside itself, and ``outside`` tells it, to be compared.
    ``must`` names the operations that may not refuse ("convert", "fold", "recalibrate"); ``never`` those that
    make no sense for the model. ``around`` is the context in which surgery is done. ``example`` is what
    surgery is given where that is not the first call's arguments. ``twice``: torch's running statistics take
    in each batch twice under activation checkpointing, and ours rightly once. ``slow``: one of many alike.
    """

    build: Callable[[], nn.Module]
    calls: Sequence[Call]
    reset: Callable[[], object] = lambda: None
    outside: Callable[[], Any] = lambda: None
    must: tuple[str, ...] = ("convert",)
    never: tuple[str, ...] = ()
    around: Callable[[], Any] = contextlib.nullcontext
    example: Any = None
    modes: tuple[bool, ...] = (True, False)
    twice: bool = False
    slow: bool = False

    def fresh(self) -> nn.Module:
        """A new model in float64, the same one each time."""
        seed(7)
        model = self.build().double()
        generator = torch.Generator().manual_seed(11)
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) or hasattr(layer, "running_mean"):
                for name, least, most in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -1, 1)):
                    _draw(getattr(layer, name, None), least, most, generator)
                _draw(getattr(layer, "running_var", None), 0.5, 2.0, generator)
        return model

    @property
    def changing(self) -> bool:
        """Whether what is done to the model in training shows in evaluation."""
        return self.twice or any(one.before is not no_change for one in self.calls)

    def given(self) -> Any:
        """The example: a tensor, a tuple of arguments or a dict of keywords."""
        if self.example is not None:
            return copy.deepcopy(self.example)
        first = self.calls[0]
        assert not (first.args and first.kwargs), "the first call takes one kind of arguments"
        args = copy.deepcopy(first.args)
        if first.kwargs:
            return copy.deepcopy(first.kwargs)
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def _draw(tensor: Any, least: float, most: float, generator: torch.Generator) -> None:
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
        with torch.no_grad():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (most - least) + least)


KINDS: dict[str, Kind] = {}


def kind(*calls: Call, **settings: Any) -> Callable[[Any], Any]:
    """Register the class or function below as a kind, under its name."""

    def register(build: Any) -> Any:
        assert build.__name__ not in KINDS, build.__name__
        KINDS[build.__name__] = Kind(build, calls, **settings)
        return build

    return register


def x(*shape: int, at: int = 0, shift: float = 0.0) -> Tensor:
    """Random numbers in float64, the same ones for the same shape and ``at``."""
    generator = torch.Generator().manual_seed(1000 * at + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) + shift


def seed(number: int) -> None:
    """Seed every global generator."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (the global one is what models draw from)


def random_states() -> dict[str, str]:
    """The states of the global generators, each as a short text that stands for it."""
    states = {"torch": torch.get_rng_state().numpy().tobytes(), "Python": repr(random.getstate()).encode()}
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    states["NumPy"] = keys.tobytes() + repr(rest).encode()
    return {name: hashlib.sha256(state).hexdigest()[:16] for name, state in states.items()}


# --- a call and all that it did ---------------------------------------------------------------------------


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with ``change`` made to each tensor; what is no plain container is kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change) for v in value))
    if type(value) in (list, tuple):
        return type(value)(mapped(v, change) for v in value)
    if type(value) is dict:
        return {k: mapped(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def observed(
    model: nn.Module, one: Call, training: bool, outside: Callable[[], Any], gradients: bool = True
) -> dict[str, Any]:
    """Make a call; what it gave, raised, wrote and drew, and the gradients of what it gave.

    ``gradients``: whether they are recorded; else the call is made as a served model's is.
    """
    seed(3)
    model.train(training)
    one.before(model)
    for parameter in model.parameters():
        parameter.grad = None
    leaves: list[Tensor] = []

    def given(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1] * 1  # not a leaf, so that a model may write to it

    seed(5)
    args, kwargs = mapped((one.args, one.kwargs), given)
    raised = None
    out: Any = None
    with torch.set_grad_enabled(gradients), one.around():
        try:
            out = one(model, *args, **kwargs)
        except Exception as error:
            raised = error
    states = random_states()
    found: dict[str, Any] = {
        "raised": "" if raised is None else type(raised).__name__,
        "output": out,
        "inputs": (args, kwargs),
        "random states": states,
        "outside": outside(),
    }
    tensors: list[Tensor] = []
    _collect(out, tensors, set())
    generator = torch.Generator().manual_seed(13)
    total: Any = 0.0
    for tensor in tensors:
        if tensor.requires_grad and tensor.is_floating_point():
            total = total + (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum()
    found["backward"] = ""
    if isinstance(total, Tensor):
        try:
            total.backward()
        except RuntimeError as error:  # what backward needs was written to by the model
            found["backward"] = str(error)
    found["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    found["input gradients"] = [leaf.grad for leaf in leaves]
    found["requires grad"] = {name: p.requires_grad for name, p in model.named_parameters()}
    found["the error"] = raised
    return found


def _collect(value: Any, found: list[Tensor], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _collect(item, found, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        for item in vars(value).values():
            _collect(item, found, seen)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a model holds, by name: tensors, modes, plain attributes, classes left out."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {
            key: value
            for key, value in vars(module).items()
            if key == "training" or not (key in _OF_TORCH or key.startswith(_OF_DYNAMO))
        }
        tensors = {**module._parameters, **module._buffers}
        found[name] = {**attributes, **tensors}
    return found


# --- comparing --------------------------------------------------------------------------------------------


class DifferentError(AssertionError):
    """Two models differ; the message says where."""


def same(found: Any, wanted: Any, where: str, exact: bool = False) -> None:
    """Raise ``DifferentError`` unless two values are the same, tensors within rounding or to the bit."""
    _same(found, wanted, where, exact, set())


def _same(found: Any, wanted: Any, where: str, exact: bool, seen: set[tuple[int, int]]) -> None:
    if (id(found), id(wanted)) in seen or isinstance(wanted, nn.Module | type):
        return
    seen.add((id(found), id(wanted)))
    if isinstance(wanted, Tensor):
        _same_tensor(found, wanted, where, exact)
        a, b = (_hung_on(value) for value in (found, wanted))
        _same(a, b, f"{where}.__dict__", exact, seen)
        return
    if type(found) is not type(wanted):
        raise DifferentError(f"{where}: {type(found).__name__} where {type(wanted).__name__} is right")
    if isinstance(wanted, Mapping):
        if list(found) != list(wanted):
            raise DifferentError(f"{where}: keys {list(found)} where {list(wanted)} is right")
        for key in wanted:
            _same(found[key], wanted[key], f"{where}[{key!r}]", exact, seen)
    if isinstance(wanted, list | tuple):
        if len(found) != len(wanted):
            raise DifferentError(f"{where}: {len(found)} items where {len(wanted)} are right")
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            _same(a, b, f"{where}[{i}]", exact, seen)
    elif isinstance(wanted, np.ndarray):
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE):
            raise DifferentError(f"{where}: other numbers")
    elif isinstance(wanted, enum.Enum | str | bytes | bool | int | set | frozenset | type(None)):
        if found != wanted:
            raise DifferentError(f"{where}: {found!r} where {wanted!r} is right")
    elif isinstance(wanted, float):
        if not (found == wanted or abs(found - wanted) <= TOLERANCE * max(1.0, abs(wanted))):
            raise DifferentError(f"{where}: {found!r} where {wanted!r} is right")
    elif isinstance(wanted, torch.Generator):
        _same_tensor(found.get_state(), wanted.get_state(), where, True)
    elif hasattr(wanted, "__dict__") and not callable(wanted):
        _same(vars(found), vars(wanted), where, exact, seen)


def _hung_on(tensor: Any) -> dict[str, Any]:
    """The attributes that a model gave to a tensor."""
    return {k: v for k, v in getattr(tensor, "__dict__", {}).items() if not k.startswith(_OF_DYNAMO)}


def _same_tensor(found: Any, wanted: Tensor, where: str, exact: bool) -> None:
    if not isinstance(found, Tensor):
        raise DifferentError(f"{where}: {type(found).__name__} where a tensor is right")
    for what in ("shape", "dtype", "requires_grad"):
        if getattr(found, what) != getattr(wanted, what):
            raise DifferentError(
                f"{where}: {what} {getattr(found, what)} where {getattr(wanted, what)} is right"
            )
    a, b = found.detach(), wanted.detach()
    if b.is_quantized or not b.numel():
        return
    if exact or not (b.is_floating_point() or b.is_complex()):
        if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            raise DifferentError(f"{where}: other numbers")
        return
    tolerance = (
        TOLERANCE if b.dtype in (torch.float64, torch.complex128) else 2e-2 if b.itemsize < 4 else 1e-4
    )
    a, b = a.double(), b.double()
    size = b[b.isfinite()].abs().max().item() if bool(b.isfinite().any()) else 1.0
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).max().item()
    if not gap <= tolerance * max(size, 1e-3):
        raise DifferentError(f"{where}: off by {gap:.2g} where the largest value is {size:.2g}")


def same_effects(found: dict[str, Any], wanted: dict[str, Any], where: str, only: Sequence[str] = ()) -> None:
    """Compare all that ``observed`` tells of two calls, or some of it."""
    if found["raised"] != wanted["raised"]:
        error = found["the error"] or wanted["the error"]
        raise DifferentError(
            f"{where}: raises {found['raised'] or 'nothing'} where {wanted['raised'] or 'nothing'} is right: "
            f"{error}"
        )
    left = {"the error", "backward"}
    if wanted[
        "backward"
    ]:  # then there are no gradients to compare, and whether another model has some is free
        left |= {"gradients", "input gradients"}
    elif found["backward"]:
        raise DifferentError(f"{where}: the backward pass fails: {found['backward']}")
    for what in only or [key for key in wanted if key not in left]:
        same(found[what], wanted[what], f"{where}, {what}")


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def same_state(
    found: nn.Module,
    wanted: nn.Module,
    where: str,
    exact: bool = False,
    only: Sequence[str] | None = None,
    left: Sequence[str] = (),
) -> None:
    """Compare what two models hold, under the names that the second one has.

    ``only``: the names of the modules to compare, where not all; ``left``: attributes that are left out.
    """
    theirs = state(found)
    for name, values in state(wanted).items():
        if only is not None and name not in only:
            continue
        if name not in theirs:
            raise DifferentError(f"{where}: there is no module {name!r}")
        for key, value in values.items():
            if key in left:
                continue
            if key not in theirs[name]:
                raise DifferentError(f"{where}: {name or 'the model'} has no {key}")
            same(theirs[name][key], value, f"{where}, {name or 'the model'}.{key}", exact)


def unchanged(model: nn.Module, reference: nn.Module, where: str) -> None:
    """Raise unless a model that was given to surgery is what it was, to the bit."""
    same_state(model, reference, where, exact=True)
    same_state(reference, model, where, exact=True)
    for (name, a), (_, b) in zip(model.named_modules(), reference.named_modules(), strict=True):
        if type(a).__qualname__ != type(b).__qualname__:  # a class may be made anew for each model
            raise DifferentError(f"{where}: {name or 'the model'} is a {type(a).__name__}")
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if len(getattr(a, hooks, ())) != len(getattr(b, hooks, ())):
                raise DifferentError(f"{where}: {name or 'the model'} has other hooks")
    wants = [p.requires_grad for p in reference.parameters()]
    if [p.requires_grad for p in model.parameters()] != wants:
        raise DifferentError(f"{where}: other parameters require gradients")
