"""``eps``: an ``eps`` that cannot be used, or not the one that the weights were trained with.

Symptom: division by zero; or outputs that are slightly wrong in channels of small variance after a
conversion.
Computation: its sign; whether it is still above 0 in the dtype of the layer's parameters or buffers; beside
the default of the framework named by ``source``; and beside the other layers of the model.
Threshold: exact. A difference from the source's default is a warning (the model may have set its own);
layers of one model that differ among themselves are a note.
Fix: take ``eps`` over with the weights. It is not part of a state dict.
Source: defaults: PyTorch, Flax, Equinox, MXNet and ONNX 1e-5, Keras 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..evidence import Evidence
from ..finding import Finding
from ._registry import check

DEFAULTS = {"pytorch": 1e-5, "keras": 1e-3, "flax": 1e-5, "equinox": 1e-5, "mxnet": 1e-5, "onnx": 1e-5}


@check("eps")
def eps(evidence: Evidence) -> Iterator[Finding]:
    """Unusable, unrepresentable, or of another framework."""
    expected = DEFAULTS.get(evidence.source or "")
    for layer in evidence.layers:
        dtypes = [d for d in (layer.parameter_dtype, layer.buffer_dtype) if d is not None]
        lost = [d for d in dtypes if layer.eps > 0 and float(torch.tensor(layer.eps, dtype=d)) == 0]
        if layer.eps <= 0:
            cause = "a channel of constant input divides by zero"
            yield Finding("eps", layer.name, "error", f"eps is {layer.eps:g}", cause, "set it to 1e-5")
        elif lost:
            yield Finding(
                "eps",
                layer.name,
                "error",
                f"eps {layer.eps:g} is 0 in {str(lost[0]).removeprefix('torch.')}",
                "an eps for float32 in a layer of half precision",
                "use 1e-5, or keep the layer in float32",
            )
        elif expected is not None and not 0.5 < layer.eps / expected < 2:
            yield Finding(
                "eps",
                layer.name,
                "warning",
                f"eps is {layer.eps:g}; the default of {evidence.source} is {expected:g}",
                "eps is not part of the weights, and was not taken over with them",
                f"set it to what the original model used, {expected:g} unless it says otherwise",
                {"eps": layer.eps},
            )
    values = sorted({layer.eps for layer in evidence.layers})
    if expected is None and len(values) > 1:
        yield Finding(
            "eps",
            "",
            "note",
            f"layers differ in eps: {', '.join(f'{value:g}' for value in values)}",
            "parts written for different frameworks",
            "check each against the model that its weights come from",
        )
