"""Layers that are only partly frozen."""

from __future__ import annotations

from collections.abc import Iterator

from ..evidence import Evidence
from ..finding import Finding
from .registry import check


@check
def partly_frozen(evidence: Evidence) -> Iterator[Finding]:
    """A layer that is only partly frozen.

    Symptom: fine-tuning that changes a layer which should stay as it is, or evaluation that depends on the
    batch.
    Computation: modes and ``requires_grad`` as they are now.
    Threshold: exact. A layer in training inside a model in evaluation is an error: it uses and updates batch
    statistics. In a model in training, it is a warning when a layer updates its statistics while γ and β do
    not learn; and when γ and β learn while the statistics are frozen and those of other layers are not. A
    layer with both frozen gives no finding.
    Fix: freeze both (``eval()`` and ``requires_grad_(False)``, or ``FrozenBatchNorm``), or neither.
    Source: ``torch.nn.Module.eval`` and ``requires_grad_`` act on different things.
    """
    some_train = any(layer.training for layer in evidence.layers)
    for layer in evidence.layers:
        if layer.frozen_class or layer.mean is None:
            continue
        if layer.training and not evidence.model_training:
            yield Finding(
                "partly-frozen",
                layer.name,
                "error",
                "in training mode, inside a model in evaluation mode",
                "train() was called on this layer, or eval() did not reach it",
                "call eval() on the whole model",
            )
        elif layer.training and layer.affine_learns is False:
            yield Finding(
                "partly-frozen",
                layer.name,
                "warning",
                "γ and β do not learn, but the running statistics are updated",
                "requires_grad_(False) does not freeze statistics",
                "call eval() on the layer after each train(), or convert it to FrozenBatchNorm",
            )
        elif evidence.model_training and not layer.training and some_train and layer.affine_learns:
            yield Finding(
                "partly-frozen",
                layer.name,
                "warning",
                "in evaluation mode inside a model in training; γ and β still learn",
                "eval() does not freeze parameters",
                "call requires_grad_(False), too; or train() to train it with the others",
            )
