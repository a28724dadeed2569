"""Compare a folded model with its original, and find which folds to undo.

The algebra is verified in float64, on the example and on inputs like it: the same folds are made in a float64
copy of the model, without rounding, and compared with that copy. Only a wrong fold can show there. Then the
folded model runs as it will be shipped, its weights rounded. Its error against float64 may be at most twice
the original's, plus the tolerance. A model that cannot run in float64 is compared in its own dtype.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SurgeryError
from ..graph.layers import rebind_closures
from ..graph.record import Inputs, leaves, map_tensors, tensors_in
from ..stats.preserve import preserved

FoldT = TypeVar("FoldT")
_COMPARED: Any = (Tensor, np.ndarray, float, int)  # what a result may hold

# Rounding each folded weight once moves a result by about eps; deep models add up a few of those.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def default_tolerance(model: nn.Module) -> float:
    """The tolerance for the coarsest dtype that the model holds."""
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return max((TOLERANCE.get(kind, 1e-5) for kind in kinds), default=1e-5)


def copied(model: nn.Module) -> nn.Module:
    """Deep-copy a model, also one whose weight is computed by a hook.

    ``weight_norm`` and pruning leave a tensor with a history in the module's ``__dict__``, which torch does
    not copy. The hook computes it again at the next call, so its values are enough.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(model, memo)
    rebind_closures(twin, memo)
    return twin


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run and return every tensor of the result; the random state is the same at each run and put back."""
    with preserved(model), torch.no_grad():
        torch.manual_seed(0)
        args, kwargs = copy.deepcopy(inputs)
        return [_number(leaf) for leaf in leaves(model(*args, **kwargs), _COMPARED)]


def _number(leaf: Any) -> Tensor:
    """A tensor, an array or a Python number of a result, as a tensor of its own."""
    if isinstance(leaf, Tensor):
        return (leaf.dequantize() if leaf.is_quantized else leaf).detach().clone()
    return torch.as_tensor(leaf).clone()


def distance(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference over largest expected magnitude, worst output; infinite if shapes differ."""
    if len(got) != len(wanted):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        size = b[b.isfinite()].abs().max().item() if bool(b.isfinite().any()) else 1.0
        gap = torch.where(same, torch.zeros_like(a), (a - b).abs()).max().item()
        if gap != gap:
            return float("inf")
        worst = max(worst, gap / max(size, 1e-30))
    return worst


def in_double(inputs: Inputs) -> Inputs:
    """Return the same inputs in float64."""
    converted: Inputs = map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)
    return converted


def alike(inputs: Inputs) -> list[Inputs]:
    """Inputs like the example, made of its own values: samples in another order, fewer of them, scaled.

    Nothing is invented: category codes stay codes and lengths stay lengths.
    """
    sizes = [t.shape[0] for t in tensors_in(inputs) if t.dim()]
    batch = sizes[0] if sizes else 0

    def samples(order: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: order(t) if t.dim() and t.shape[0] == batch else t

    def scaled(tensor: Tensor) -> Tensor:
        return tensor * 0.75 if tensor.is_floating_point() else tensor

    def turned(tensor: Tensor) -> Tensor:
        """Of pictures and the like: each mirrored, which for one sample is the only other order."""
        return tensor.flip(-1) if tensor.is_floating_point() and tensor.dim() > 2 else tensor

    changes: list[Callable[[Tensor], Tensor]] = [scaled, turned]
    if batch > 1:
        changes += [samples(lambda t: t.flip(0)), samples(lambda t: t[: (batch + 1) // 2])]
    return [map_tensors(inputs, change) for change in changes]


class Errors(NamedTuple):
    """Relative distances; see ``FoldReport``."""

    example: float
    random: float
    native: float
    original: float

    def within(self, tolerance: float) -> bool:
        """Within tolerance in float64, and natively within tolerance of twice the original's error."""
        exact = max(self.example, self.random) <= tolerance
        return exact and self.native <= 2 * self.original + tolerance


class Verifier:
    """Holds the original's outputs, and measures folded models against them."""

    def __init__(self, original: nn.Module, example: Inputs) -> None:
        self.inputs, self.native = [example], [run(original, example)]
        for inputs in alike(example):
            try:
                self.native.append(run(original, inputs))
            except Exception:  # the model's own code refuses it: it says nothing about a fold
                continue
            self.inputs.append(inputs)
        if distance(run(original, example), self.native[0]) != 0.0:
            raise SurgeryError(
                "the model gives a different output for the same input, so nothing can be verified"
            )
        try:
            self.twin = copy.deepcopy(original).double()
            self.truth = [run(self.twin, in_double(inputs)) for inputs in self.inputs]
            self.double = True
        except Exception:  # a model that works in one dtype only: compare in that dtype
            self.twin, self.truth, self.double = original, self.native, False
        self.original = max(map(distance, self.native, self.truth))

    def measure(self, folded: nn.Module, exact: nn.Module) -> Errors:
        """Distances of a folded model, and of the same folds made in ``twin``, unrounded."""
        native = self.native_error(folded)
        inputs = [in_double(i) for i in self.inputs] if self.double else self.inputs
        found = [distance(run(exact, i), t) for i, t in zip(inputs, self.truth, strict=True)]
        return Errors(found[0], max(found[1:], default=0.0), native, self.original)

    def native_error(self, folded: nn.Module) -> float:
        """Distance of a model in its own dtype from the original in float64."""
        return max(distance(run(folded, i), t) for i, t in zip(self.inputs, self.truth, strict=True))


def search(
    folds: Sequence[FoldT], test: Callable[[list[FoldT]], str]
) -> tuple[list[FoldT], dict[FoldT, str]]:
    """The folds that pass together, found by halving, and what is wrong with each of the others.

    ``test`` returns what is wrong with some folds, or nothing.
    """
    refused: dict[FoldT, str] = {}

    def with_base(base: list[FoldT], some: Sequence[FoldT]) -> list[FoldT]:
        """``base``, and those of the later ``some`` that pass with it."""
        if not some:
            return base
        wrong = test([*base, *some])
        if not wrong:
            return [*base, *some]
        if len(some) == 1:
            refused[some[0]] = wrong
            return base
        middle = len(some) // 2
        return with_base(with_base(base, some[:middle]), some[middle:])

    return with_base([], folds), refused
