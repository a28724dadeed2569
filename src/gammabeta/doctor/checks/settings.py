"""How a layer is set up: ``eps``, ``momentum``, what of it is frozen or decays, a bias before it."""

from collections.abc import Iterator

import torch

from ..evidence import Evidence, Layer
from ..finding import RECALIBRATE, Finding, Severity
from .registry import check, check_layers

DEFAULTS = {"pytorch": 1e-5, "keras": 1e-3, "flax": 1e-5, "equinox": 1e-5, "mxnet": 1e-5, "onnx": 1e-5}


@check
def eps(evidence: Evidence) -> Iterator[Finding]:
    """An ``eps`` that cannot be used, or that differs from the one used in training.

    Symptom: division by zero; or outputs that are slightly wrong in channels of small variance after a
    conversion.
    Computation: its sign; whether it is still above 0 in the dtype of the layer's parameters or buffers; a
    comparison with the default of the framework named by ``source``, and with the other layers of the model.
    Threshold: exact. A difference from the source's default is a warning (the model may have set its own);
    layers of one model that differ among themselves are a note.
    Fix: copy ``eps`` together with the weights. It is not part of a state dict.
    Source: defaults: PyTorch, Flax, Equinox, MXNet and ONNX 1e-5, Keras 1e-3.
    """
    expected = DEFAULTS.get(evidence.source or "")
    for layer in evidence.layers:
        dtypes = [d for d in (layer.parameter_dtype, layer.buffer_dtype) if d is not None]
        lost = [d for d in dtypes if layer.eps > 0 and float(torch.tensor(layer.eps, dtype=d)) == 0]
        if layer.eps <= 0:
            why = "a constant channel divides by zero", "raise it: `layer.eps = 1e-5`"
            yield Finding("error", f"eps is {layer.eps:g}", *why, layer=layer.name)
        elif lost:
            yield Finding(
                "error",
                f"eps {layer.eps:g} is 0 in {str(lost[0]).removeprefix('torch.')}",
                "an eps for float32 in a layer of half precision",
                "raise it: `layer.eps = 1e-5`; or keep the layer in float32",
                layer=layer.name,
            )
        elif expected is not None and not 0.5 < layer.eps / expected < 2:
            yield Finding(
                "warning",
                f"eps is {layer.eps:g}; the default of {evidence.source} is {expected:g}",
                "eps is not part of the weights, and was not copied with them",
                f"as in the original model, {expected:g} if it says nothing else: `layer.eps = {expected:g}`",
                {"eps": layer.eps},
                layer=layer.name,
            )
    values = sorted({layer.eps for layer in evidence.layers})
    if expected is None and len(values) > 1:
        yield Finding(
            "note",
            f"layers differ in eps: {', '.join(f'{value:g}' for value in values)}",
            "parts written for different frameworks",
            "check each against the model that its weights come from",
        )


OTHER_CONVENTION, MISPLACED = 0.9, 0.05


@check_layers(Evidence.updating)
def momentum(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """A momentum that is hardly intended.

    Symptom: statistics that never change, follow the last batch alone, or give a small last batch the weight
    of a full one.
    Computation: the attribute; for None (equal weight to each batch) also the sizes of the loader's batches:
    half the sum of |1/batches − size/samples|, the share of weight that lands on the wrong samples.
    Threshold: outside [0, 1] an error; exactly 0 or 1 and from 0.9 a warning: PyTorch's momentum is the
    weight of the *new* value, so the 0.9 or 0.99 of MXNet, Keras, Flax and ONNX is 0.1 or 0.01 here, and at
    0.9 the last batch alone has nine tenths of the weight. None: 5 % misplaced, which one half-full last
    batch among many does not reach.
    Fix: 1 minus the other framework's value; for None, drop the last batch, or recalibrate.
    Source: the definitions of momentum in PyTorch, Keras, Flax, MXNet and ONNX.
    """
    value = layer.momentum
    if value is None:
        misplaced = misplaced_weight(evidence.batch_images)
        if misplaced > MISPLACED:
            yield Finding(
                "warning",
                f"momentum None weighs all batches the same: {misplaced:.0%} of the weight is misplaced",
                "batches of uneven size under a plain average of batches",
                f"drop the last batch, or {RECALIBRATE}, which gives every value the same weight",
                {"misplaced": misplaced},
            )
    elif not OTHER_CONVENTION > value > 0:
        severity: Severity = "warning" if 0 <= value <= 1 else "error"
        yield Finding(severity, f"momentum is {value:g}", *_cause_and_fix(value), {"momentum": value})


def misplaced_weight(sizes: tuple[int, ...]) -> float:
    """Total variation distance between equal weight per batch and equal weight per sample."""
    total = sum(sizes)
    return sum(abs(1 / len(sizes) - size / total) for size in sizes) / 2 if total else 0.0


def _cause_and_fix(value: float) -> tuple[str, str]:
    right = 1 - value if 0 < value < 1 else 0.1
    fix = f"set it to {right:.3g}: `layer.momentum = {right:.3g}`, then {RECALIBRATE}"
    if not 0 <= value <= 1:
        return "a weight must lie between 0 and 1", fix
    if value == 0:
        fix += "; to freeze the layer use eval() or FrozenBatchNorm"
        return "with momentum 0 the running statistics never change", fix
    if value == 1:
        return "with momentum 1 the running statistics are the last batch's", fix
    return "in PyTorch, momentum is the weight of the new value; elsewhere it is that of the old one", fix


@check_layers()
def partly_frozen(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """A layer that is only partly frozen.

    Symptom: fine-tuning that changes a layer which should stay as it is, or evaluation that depends on the
    batch.
    Computation: modes and ``requires_grad`` as they are now.
    Threshold: exact. A layer in training inside a model in evaluation is an error: it uses and updates batch
    statistics. In a model in training, it is a warning when a layer updates its statistics while γ and β do
    not learn; and when γ and β learn while the statistics are frozen and those of other layers are not. A
    layer with both frozen gives no finding, nor one that the model's own ``train()`` leaves in evaluation.
    Fix: freeze both (``eval()`` and ``requires_grad_(False)``, or ``FrozenBatchNorm``), or neither.
    Source: ``torch.nn.Module.eval`` and ``requires_grad_`` act on different things.
    """
    if layer.frozen_class or layer.held or layer.mean is None:
        return
    others_train = any(other.training for other in evidence.layers)
    if layer.training and not evidence.model_training:
        yield Finding(
            "error",
            "in training mode, inside a model in evaluation mode",
            "train() was called on this layer, or eval() did not reach it",
            "call eval() on the whole model: `model.eval()`",
        )
    elif layer.training and layer.affine_learns is False:
        yield Finding(
            "warning",
            "γ and β do not learn, but the running statistics are updated",
            "requires_grad_(False) does not freeze statistics",
            "hold it still after each train(): `layer.eval()`; or convert it to FrozenBatchNorm",
        )
    elif evidence.model_training and not layer.training and layer.affine_learns and others_train:
        yield Finding(
            "warning",
            "in evaluation mode inside a model in training; γ and β still learn",
            "eval() does not freeze parameters",
            "freeze them, too: `layer.requires_grad_(False)`; or train() to train it with the others",
        )


@check
def weight_decay_on_affine(evidence: Evidence) -> Iterator[Finding]:
    """Weight decay on γ or β.

    Symptom: usually none; sometimes channels that fade, and a slightly worse optimum.
    Computation: the optimiser's groups.
    Threshold: any positive weight decay; a note, since opinions and measurements differ.
    Fix: a second parameter group without weight decay for all one-dimensional parameters.
    Source: Goyal et al. (2017), "Accurate, large minibatch SGD", section 5.1; He et al. (2019), "Bag of
    tricks", section 3.1 ("no bias decay").
    """
    if evidence.optimizer is None:
        return
    for name, which in evidence.optimizer.decayed.items():
        yield Finding(
            "note",
            f"{' and '.join(which)} in a group with weight decay {evidence.optimizer.weight_decay:g}",
            "one parameter group for everything",
            "put one-dimensional parameters in a group without weight decay",
            layer=name,
        )


@check_layers()
def redundant_bias(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """A bias that has no effect, because the normalization after it subtracts it.

    Symptom: none in the results; it costs memory and time, and its gradient is zero up to rounding.
    Computation: a convolution or linear layer with a bias whose output goes unchanged into the layer; found
    by tracing, or in ``nn.Sequential``.
    Threshold: none; a note. Not for frozen layers, which subtract a constant: there the bias has an effect.
    Fix: ``bias=False`` before batch normalization; β replaces it.
    Source: Ioffe and Szegedy (2015), section 3.2.
    """
    around = evidence.around(layer)
    if around.producer_bias and not layer.frozen:
        yield Finding(
            "note",
            f"the bias of {around.producer} goes directly into this layer",
            "subtracting the batch mean removes any constant",
            "create it with bias=False",
        )
