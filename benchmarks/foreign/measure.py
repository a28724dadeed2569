"""What ``convert``, ``fold``, ``recalibrate`` and ``export_onnx`` make of one model.

The judge is the untouched model in float64. How far rounding alone can move a result is measured too: by how
much it moves when the input moves in its last bit. A result is wrong when it is off by many times that.
"""

import copy
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import gammabeta as gb
from gammabeta.errors import GammabetaError

from . import watch
from .models import Foreign, Inputs

OPERATIONS = ("convert", "convert with example", "train in float32", "fold", "recalibrate")
LARGEST = 90_000_000  # parameters; what is larger is left out, and said
_FLOOR = 1e-9
_TIMES = 1000.0  # the last bit's effect; sums in another order round at every step, the input only once
_SINGLE = 1e-4  # rounding in float32, of a norm that is small
_BATCHES = 5
_TRAINING = 4
_SERVING = 2


@dataclass
class Effects:
    """All that a run gave and did, as tensors by name."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def measure(foreign: Foreign, operations: tuple[str, ...] = OPERATIONS) -> dict[str, Any]:
    """One model's row: what became of it in each operation.

    Raises:
        ImportError: its library is not installed.
    """
    began = time.perf_counter()
    row: dict[str, Any] = {"model": foreign.name}
    with _quiet():
        torch.manual_seed(0)
        model = foreign.build()
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if row["parameters"] > LARGEST:
            return {**row, "skipped": f"more than {LARGEST:,} parameters"}
        subject = _Subject.of(foreign, model)
        if subject is None:
            return {**row, "skipped": "the model itself does not run on any of the sizes"}
        row |= {"size": subject.size, "norms": len(subject.ran), "activations": len(subject.behind)}
        for operation in operations:
            row[operation] = _judged(subject, _OPERATIONS[operation])
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's code
        yield


class _Subject:
    """A model in float64 with lively statistics, its inputs, and the truth about it."""

    def __init__(self, foreign: Foreign, model: nn.Module, size: int) -> None:
        self.foreign, self.model, self.size = foreign, model, size
        self.served = [foreign.inputs(_SERVING, size, 1), foreign.inputs(_SERVING + 1, size, 2)]
        self.trained = foreign.inputs(_TRAINING, size, 3)
        self.ran, self.behind = watch.followers(model.eval(), lambda m: _call(m, _double(self.served[0])))
        self.truth = [self.serve(model, inputs) for inputs in self.served]
        self.step = self.train(model, self.trained)
        nudged = [self.serve(model, inputs, nudge=True) for inputs in self.served]
        self.served_limit = _limit(max(map(distance, nudged, self.truth)))
        self.step_limit = _limit(farthest(self.train(model, self.trained, nudge=True), self.step)[0])

    @classmethod
    def of(cls, foreign: Foreign, model: nn.Module) -> "_Subject | None":
        """The subject at the smallest size that runs, or None."""
        for size in foreign.sizes:
            twin = copy.deepcopy(model).double()
            try:
                _enliven(twin, _double(foreign.inputs(_TRAINING, size, 0)))
                return cls(foreign, twin, size)
            except Exception:  # other people's checks of sizes raise anything
                continue
        return None

    def serve(self, model: nn.Module, inputs: Inputs, nudge: bool = False) -> list[Tensor]:
        """Outputs in evaluation mode, of a model that may be changed by it as little as torch's own."""
        _seed(5)
        with torch.no_grad():
            return _tensors(_call(model.eval(), _double(inputs, nudge)))

    def train(self, model: nn.Module, inputs: Inputs, nudge: bool = False) -> Effects:
        """One step on a copy: outputs, gradients and buffers."""
        return training_step(copy.deepcopy(model), _double(inputs, nudge))


def training_step(model: nn.Module, inputs: Inputs) -> Effects:
    """Outputs, gradients and buffers of one step without the optimiser; the model is changed by it."""
    model.train()
    _seed(5)
    outputs = _tensors(_call(model, inputs))
    generator = torch.Generator().manual_seed(7)
    total = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum()
        for o in outputs
        if o.requires_grad
    )
    total.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Effects([o.detach() for o in outputs], gradients, dict(model.named_buffers()))


def _enliven(model: nn.Module, inputs: Inputs) -> None:
    """Draw γ and β, and take the running statistics of a batch, so that no batch norm is the identity."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.affine:
            with torch.no_grad():
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.2)
    momenta = [(m, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm)]
    for layer, _ in momenta:
        layer.momentum = 1.0
    _seed(1)
    with torch.no_grad():
        _call(model.train(), inputs)
    for layer, momentum in momenta:
        layer.momentum = momentum
    model.eval()


def _seed(number: int) -> None:
    """Seed the global generators, from all of which some models draw."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def _call(model: nn.Module, inputs: Inputs) -> Any:
    inputs = copy.deepcopy(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _double(inputs: Inputs, nudge: bool = False) -> Inputs:
    def change(x: Tensor) -> Tensor:
        x = x.double()
        signs = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) < 0.5, -1.0, 1.0)
        return x * (1 + signs.double() * 2.0**-52) if nudge else x

    if isinstance(inputs, dict):
        return {name: change(x) for name, x in inputs.items()}
    return tuple(change(x) for x in inputs)


def _tensors(output: Any) -> list[Tensor]:
    output = dict(output) if hasattr(output, "to_tuple") else output
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def _limit(rounding: float) -> float:
    return min(_FLOOR + _TIMES * rounding, 1e-4)


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest distance of an output, relative to the norm of what is right; inf for another form."""
    if len(found) != len(wanted):
        return math.inf
    return max((_relative(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    a, b = found.detach().double(), wanted.detach().double()
    gap = float((a - b).norm())
    return math.inf if gap != gap else gap / max(float(b.norm()), 1e-30) if gap else 0.0


def farthest(found: Effects, wanted: Effects) -> tuple[float, str]:
    """The largest distance of all that a step did, and where it is.

    Gradients are measured against the norm of all of them: behind a batch norm a bias has none but rounding.
    """
    if set(found.gradients) != set(wanted.gradients):
        odd = sorted(set(found.gradients) ^ set(wanted.gradients))
        return math.inf, f"gradient of {odd[0]}, there in one of the two only"
    if not set(wanted.buffers) <= set(found.buffers):
        return math.inf, f"buffer {min(set(wanted.buffers) - set(found.buffers))} is missing"
    whole = math.sqrt(sum(float(g.double().norm()) ** 2 for g in wanted.gradients.values()))
    places = [(distance(found.outputs, wanted.outputs), "output")]
    for name, right in wanted.gradients.items():
        gap = float((found.gradients[name].double() - right.double()).norm())
        places.append((math.inf if gap != gap else gap / max(whole, 1e-30), f"gradient of {name}"))
    for name, right in wanted.buffers.items():
        if right.is_floating_point():
            places.append((_relative(found.buffers[name], right), name))
        elif not torch.equal(found.buffers[name], right):
            places.append((math.inf, name))
    return max(places)


# --- the operations ---------------------------------------------------------------------------------------


def _judged(subject: _Subject, operation: Callable[[_Subject], dict[str, Any]]) -> dict[str, Any]:
    """What an operation found, "ok", "wrong", "refused" or "crash", and whether the model is what it was."""
    before = copy.deepcopy(subject.model.eval())
    began = time.perf_counter()
    try:
        found = operation(subject)
    except GammabetaError as error:
        found = {"outcome": "refused", "why": str(error)}
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        found = {"outcome": "crash", "why": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
    changed = _changed(subject.model, before)
    if changed:
        found |= {"outcome": "wrong", "why": f"the model given has another {changed}"}
        subject.model = before
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def _changed(model: nn.Module, before: nn.Module) -> str:
    """The first thing in which a model is not what it was."""
    if [type(m) for m in model.modules()] != [type(m) for m in before.modules()]:
        return "class of a module"
    if [m.training for m in model.modules()] != [m.training for m in before.modules()]:
        return "mode"
    now, was = model.state_dict(), before.state_dict()
    if list(now) != list(was):
        return "state dict"
    for name, tensor in was.items():
        same = torch.equal(torch.nan_to_num(now[name]), torch.nan_to_num(tensor))
        if not same or now[name].dtype != tensor.dtype:
            return name
    return ""


def _converted(subject: _Subject, example: bool) -> dict[str, Any]:
    given = _double(subject.served[0]) if example else None
    keys = list(subject.model.state_dict())
    began = time.perf_counter()
    converted = gb.convert(subject.model, example=given)
    seconds = time.perf_counter() - began
    changes = {change.layer: change for change in converted.conversion_report.changes}
    ours = [name for name in subject.ran if name in changes and changes[name].before != changes[name].after]
    fused, reasons = 0, {}
    for activation, names in subject.behind:
        if any(changes[name].fused for name in names if name in changes):
            fused += 1
            continue
        for name in names:
            why = changes[name].reason if name in changes else "not in the report"
            reasons[name] = f"{activation}: {why}"
    found: dict[str, Any] = {"ours": len(ours), "fused": fused, "reasons": reasons, "took": round(seconds, 2)}
    left = {name: changes[name].reason for name in subject.ran if name in changes and name not in ours}
    found["left"] = {**left, **{name: "not in the report" for name in subject.ran if name not in changes}}
    if list(converted.state_dict()) != keys:
        return {**found, "outcome": "wrong", "why": "other keys in the state dict"}
    served = max(
        distance(subject.serve(converted, inputs), truth)
        for inputs, truth in zip(subject.served, subject.truth, strict=True)
    )
    step, where = farthest(subject.train(converted, subject.trained), subject.step)
    found |= {"evaluation": served, "training": step}
    if not served <= subject.served_limit:
        return {**found, "outcome": "wrong", "why": f"outputs in evaluation are off by {served:.1e}"}
    if not step <= subject.step_limit:
        return {**found, "outcome": "wrong", "why": f"training is off by {step:.1e} at {where}"}
    return {**found, "outcome": "ok"}


def _trained(subject: _Subject) -> dict[str, Any]:
    """A step in float32, where kernels serve, against the float64 one: as near to it as the original's.

    An activation that rounding puts on the other side of a corner changes a gradient by a step, the
    original's too. So another batch is tried then: what is wrong is wrong with each.
    """
    single = copy.deepcopy(subject.model).float()
    converted = gb.convert(copy.deepcopy(single))
    inputs, right = subject.trained, subject.step
    for batches in range(1, _BATCHES + 1):
        own = _off(training_step(copy.deepcopy(single), inputs), right)
        ours = _off(training_step(copy.deepcopy(converted), inputs), right)
        far = [name for name, error in ours.items() if not error <= 2 * own[name] + _SINGLE]
        found = {"original": own, "converted": ours, "batches": batches}
        if not far:
            return {**found, "outcome": "ok"}
        inputs = subject.foreign.inputs(_TRAINING, subject.size, 30 + batches)
        right = subject.train(subject.model, inputs)
    name = far[0]
    why = f"{name} are off by {ours[name]:.1e} from float64, the original's by {own[name]:.1e}"
    return {**found, "outcome": "wrong", "why": f"{why}, and so on {_BATCHES} batches"}


def _off(found: Effects, wanted: Effects) -> dict[str, float]:
    """How far outputs, all gradients together and the buffers are off."""
    whole = math.sqrt(sum(float(g.norm()) ** 2 for g in wanted.gradients.values()))
    gaps = [float((found.gradients[n].double() - g).norm()) for n, g in wanted.gradients.items()]
    buffers = [
        _relative(found.buffers[name], right)
        for name, right in wanted.buffers.items()
        if right.is_floating_point()
    ]
    return {
        "outputs": distance(found.outputs, wanted.outputs),
        "gradients": math.sqrt(sum(gap**2 for gap in gaps)) / max(whole, 1e-30),
        "buffers": max(buffers, default=0.0),
    }


def _folded(subject: _Subject) -> dict[str, Any]:
    folded = gb.fold(subject.model, _double(subject.served[0]))
    report = folded.fold_report
    found: dict[str, Any] = {
        "folded": len(report.folded),
        "guarded": len(report.guarded),
        "reported": len(report.layers),
        "left": {layer.name: f"{layer.outcome}: {layer.reason}" for layer in report.left},
    }
    served = max(
        distance(subject.serve(folded, inputs), truth)
        for inputs, truth in zip(subject.served, subject.truth, strict=True)
    )
    found["evaluation"] = served
    if not served <= subject.served_limit:
        return {**found, "outcome": "wrong", "why": f"outputs are off by {served:.1e}"}
    return {**found, "outcome": "ok"}


def _recalibrated(subject: _Subject) -> dict[str, Any]:
    inputs = _double(subject.trained)

    def forward(model: nn.Module, _batch: object) -> None:
        _seed(5)
        _call(model, inputs)

    wanted = watch.statistics(subject.model, lambda m: forward(m, None))
    twin = copy.deepcopy(subject.model)
    gb.recalibrate(twin, [torch.zeros(_TRAINING)], forward_fn=forward)
    worst, where = 0.0, ""
    for name, layer in twin.named_modules():
        if isinstance(layer, _BatchNorm) and name in wanted:
            for found, right in zip((layer.running_mean, layer.running_var), wanted[name], strict=True):
                off = math.inf if found is None else float((found - right).norm() / (right.norm() + 1e-6))
                worst, where = max((worst, where), (off, name))
    limit = max(subject.served_limit, subject.step_limit)
    if not worst <= limit:
        return {"outcome": "wrong", "why": f"statistics of {where} are off by {worst:.1e}", "off": worst}
    return {"outcome": "ok", "off": worst}


def _exported(subject: _Subject) -> dict[str, Any]:
    single = copy.deepcopy(subject.model).float()
    inputs = subject.served[0]
    with tempfile.TemporaryDirectory() as folder:
        report = gb.export_onnx(single, Path(folder) / "model.onnx", inputs)
    return {"outcome": "ok", "bytes": report.bytes} if hasattr(report, "bytes") else {"outcome": "ok"}


_OPERATIONS: dict[str, Callable[[_Subject], dict[str, Any]]] = {
    "convert": lambda subject: _converted(subject, example=False),
    "convert with example": lambda subject: _converted(subject, example=True),
    "train in float32": _trained,
    "fold": _folded,
    "recalibrate": _recalibrated,
    "export_onnx": _exported,
}
