"""Batch normalization layers on a GPU: one training step of ours, of torch eager and of torch.compile.

A step is the forward in training mode, running statistics included, and the backward to all inputs under a
random upstream gradient, through ``gammabeta.functional.batch_norm`` and through torch's operators (its
additions and ReLU in place, as torch's own models have them).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gammabeta import functional

from ..harness import IncorrectError

BATCHES = (64, 256)
STAGES = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))  # ResNet-50: channels, side
OTHERS = {"3-D": (8, 32, 64, 64, 64), "perceptron": (65536, 1024), "small perceptron": (1024, 512)}
OPERATIONS = {"BN": (None, False), "BN+ReLU": ("relu", False), "BN+add+ReLU": ("relu", True)}
_FLOORS = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8}  # of the largest true value


@dataclass(frozen=True)
class Case:
    """One layer on one shape."""

    operation: str
    name: str
    shape: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype

    @property
    def activation(self) -> str | None:
        """What follows the normalisation."""
        return OPERATIONS[self.operation][0]

    @property
    def added(self) -> bool:
        """Whether a residual comes before the activation."""
        return OPERATIONS[self.operation][1]

    @property
    def nbytes(self) -> int:
        """Of the input."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def title(self) -> str:
        """For people."""
        layout = "channels_last" if self.channels_last else "contiguous"
        size = "×".join(map(str, self.shape))
        return f"{self.operation} · {self.name} {size} · {layout} · {str(self.dtype).removeprefix('torch.')}"


def cases(quick: bool) -> list[Case]:
    """Every layer that is measured: ResNet-50's stages in both layouts, a volume, two perceptrons."""
    shapes: list[tuple[str, tuple[int, ...], tuple[bool, ...]]] = [
        ("ResNet-50", (n, c, side, side), (False, True)) for n in BATCHES for c, side in STAGES
    ]
    shapes += [
        (name, shape, (False, True) if len(shape) == 5 else (False,)) for name, shape in OTHERS.items()
    ]
    if quick:
        shapes = [shapes[1], shapes[3], shapes[-2]]
    return [
        Case(operation, name, shape, layout, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for operation in OPERATIONS
        for name, shape, layouts in shapes
        for layout in layouts
    ]


def fewest_bytes(case: Case, part: str = "step") -> int:
    """Each input read once, each output written once: forward x to out; backward grad and x to dx.

    A residual is read in both, and its gradient is written.
    """
    forward = 3 if case.added else 2
    backward = 5 if case.added else 3
    return {"forward": forward, "backward": backward, "step": forward + backward}[part] * case.nbytes


class Layer:
    """A case with its tensors; several of them rotate."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(case.shape))
        form = last if case.channels_last and last else torch.contiguous_format

        def draw() -> Tensor:
            t = torch.randn(case.shape, device=device, generator=generator)
            return t.to(case.dtype).contiguous(memory_format=form)

        channels = case.shape[1]
        self.case = case
        self.x = draw().mul_(2).add_(0.5).requires_grad_()
        self.residual = draw().requires_grad_() if case.added else None
        self.grad = draw()
        self.weight = torch.rand(channels, device=device, generator=generator).add_(0.5).requires_grad_()
        self.bias = torch.randn(channels, device=device, generator=generator).requires_grad_()
        self.mean, self.var = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is asked of."""
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]

    def step(self, layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Forward and backward of one of the programs below."""
        out = layer(self.x, self.residual, self.mean, self.var, self.weight, self.bias)
        return out, *torch.autograd.grad(out, self.leaves, self.grad)

    def exact(self) -> tuple[Tensor, ...]:
        """The same in float64."""
        leaves = [t.detach().double().requires_grad_() for t in self.leaves]
        z = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True)
        if self.case.added:
            z = z + leaves[3]
        out = F.relu(z) if self.case.activation else z
        return out.detach(), *torch.autograd.grad(out, leaves, self.grad.double())


def torch_program(case: Case, inplace: bool) -> Callable[..., Tensor]:
    """The layer in torch's operators; in place for eager, pure for the compiler."""

    def layer(x: Tensor, residual: Any, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, True)
        if residual is not None:
            y = y.add_(residual) if inplace else y + residual
        return F.relu(y, inplace=inplace) if case.activation else y

    return layer


def our_program(case: Case, backend: str = "gpu") -> Callable[..., Tensor]:
    """The layer in ours."""

    def layer(x: Tensor, residual: Any, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.batch_norm(
            x, mean, var, weight, bias, True, activation=case.activation, residual=residual, backend=backend
        )

    return layer


def check(
    layer: Layer, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], slack: float = 2.0
) -> None:
    """Raise ``IncorrectError`` unless every output is within ``slack`` times torch's worst error, or a floor.

    Gradients behind a ReLU are compared where the true pre-activation is not within rounding of the kink:
    there either side is right, and the gradient all or nothing.
    """
    exact = layer.exact()
    for i, (true, mine, torchs) in enumerate(zip(exact, layer.step(ours), layer.step(theirs), strict=True)):
        keep = torch.ones_like(true, dtype=torch.bool)
        if layer.case.activation and true.dim() > 1 and i:
            keep = _away_from_kink(layer)
        scale = true.abs().max().item()
        error = ((mine.double() - true).abs() * keep).max().item()
        budget = slack * ((torchs.double() - true).abs() * keep).max().item()
        floor = _FLOORS[mine.dtype] * scale * (16 if true.dim() == 1 else 1)  # a kink flips terms of the sums
        if not error <= budget + floor:
            raise IncorrectError(
                f"{layer.case.title}: output {i} is off by {error:.3g}, allowed {budget + floor:.3g}"
            )


def _away_from_kink(layer: Layer) -> Tensor:
    with torch.no_grad():
        z = F.batch_norm(layer.x.double(), None, None, layer.weight.double(), layer.bias.double(), True)
        if layer.residual is not None:
            z = z + layer.residual.double()
        return z.abs() > 1e-2 if layer.case.dtype is torch.bfloat16 else z.abs() > 1e-4
