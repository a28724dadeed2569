"""``momentum``: a weight of the new value that cannot be meant.

Symptom: statistics that never move, follow the last batch alone, or weigh a remainder like a full batch.
Computation: the attribute; for None (equal weight to each batch) also the sizes of the loader's batches:
half the sum of |1/batches − size/samples|, the share of weight that lands on the wrong samples.
Threshold: outside [0, 1] an error; exactly 0 or 1 and from 0.9 a warning: PyTorch's momentum is the weight
of the *new* value, so the 0.9 or 0.99 of MXNet, Keras, Flax and ONNX is 0.1 or 0.01 here, and at 0.9 the
last batch alone has nine tenths of the weight. None: 5 % misplaced, which a last half batch of many does
not reach.
Fix: 1 minus the other framework's value; for None, drop the last batch, or recalibrate.
Source: the definitions of momentum in PyTorch, Keras, Flax, MXNet and ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding, Severity
from ._registry import check, updating

OTHER_CONVENTION, MISPLACED = 0.9, 0.05


@check("momentum")
def momentum(evidence: Evidence) -> Iterator[Finding]:
    """Momentum of another convention, or none where it matters."""
    misplaced = misplaced_weight(evidence.batch_images)
    for layer in updating(evidence.layers):
        value = layer.momentum
        if value is None:
            if misplaced > MISPLACED:
                yield Finding(
                    "momentum",
                    layer.name,
                    "warning",
                    f"momentum None weighs every batch alike: {misplaced:.0%} of the weight is misplaced",
                    "batches of uneven size under a plain average of batches",
                    "drop the last batch, or recalibrate, which weighs values",
                    {"misplaced": misplaced},
                )
        elif not OTHER_CONVENTION > value > 0:
            yield _odd(layer.name, value)


def misplaced_weight(sizes: tuple[int, ...]) -> float:
    """Total variation distance between equal weight per batch and equal weight per sample."""
    total = sum(sizes)
    return sum(abs(1 / len(sizes) - size / total) for size in sizes) / 2 if total else 0.0


def _odd(name: str, value: float) -> Finding:
    if not 0 <= value <= 1:
        cause, fix = "a weight must lie between 0 and 1", "set it to 0.1"
    elif value == 0:
        cause = "with momentum 0 the running statistics never move"
        fix = "set it to 0.1 and recalibrate; to freeze the layer use eval() or FrozenBatchNorm"
    elif value == 1:
        cause = "with momentum 1 the running statistics are the last batch's"
        fix = "set it to 0.1 and recalibrate"
    else:
        cause = "in PyTorch, momentum is the weight of the new value; elsewhere it is that of the old one"
        fix = f"set it to {1 - value:.3g} and recalibrate"
    severity: Severity = "warning" if 0 <= value <= 1 else "error"
    return Finding("momentum", name, severity, f"momentum is {value:g}", cause, fix, {"momentum": value})
