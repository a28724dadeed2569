"""``recalibrate``: replace running statistics by the exact ones of a data set.

Running statistics are an exponential average over batches of *different* weights, each weighted alike
whatever its size. Ioffe and Szegedy (2015, algorithm 2, lines 8-12) meant something else for inference: the
population's mean and variance under the final weights. This module computes those, in one of two ways that
the literature distinguishes:

``"joint"`` (one pass)
    Every layer normalises by its batch, as in training, while the moments of its input are pooled. This is
    Ioffe and Szegedy's algorithm 2 and the "PreciseBN" of Wu and Johnson (2021, "Rethinking 'Batch' in
    BatchNorm", section 3), except that the variance is the population's own, pooled about the common mean,
    and not the average of the batches' variances. The first layer's statistics are the same for any split
    of the data into batches; a deeper layer sees what its predecessors make of each batch, so use batches as
    large as in training, or larger.

``"in-order"`` (one partial pass per layer)
    Each layer is measured with every earlier one already in evaluation on its new statistics, so it sees
    exactly what it will see in use. The result does not depend on the split at any depth. It costs as many
    passes as there are layers, each one stopped when its layer has been reached, and needs a loader that can
    be iterated repeatedly. (A layer that one forward pass calls several times normalises by its batch while
    it is measured itself.)
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from ..arguments import check_batches, check_model
from ..errors import UsageError
from ..graph.layers import unwrap
from .batches import ForwardFn, call
from .moments import Ranks
from .passes import NotCalibrated as NotCalibrated
from .passes import Passes, finish, to_measure
from .preserve import preserved, set_modes

Mode = Literal["joint", "in-order"]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    samples: int | None = None,
    mode: Mode = "joint",
    forward_fn: ForwardFn | None = None,
    include_frozen: bool = False,
    merge_ranks: bool = True,
    progress: Callable[[int], object] | None = None,
) -> nn.Module:
    """Set every layer's running statistics to the exact moments of its input over ``loader``.

    Means and variances are pooled in float64 by Chan's formula, so each *value* weighs the same, whatever the
    sizes of the batches. ``running_var`` gets the unbiased variance (the sum of squares over n − 1), as
    PyTorch stores it. Dropout and everything else but batch normalization is in evaluation. A layer called
    several times per forward pass pools all its inputs, and so does one whose statistics other code uses
    (``F.batch_norm`` on its buffers, a ScriptModule, an exported graph). A class of your own with a mean and
    a variance is measured if a trial shows that it is a batch normalization. Layers without running
    statistics and frozen layers (see below) keep what they have. ``num_batches_tracked`` becomes the number
    of batches pooled where it was less.

    All or nothing: when anything raises (the loader, the model, a non-finite moment) the model is left bit
    for bit as it was. Modes, momentum, hooks and every other buffer are as before in any case.

    Args:
        model: any module with batch normalization in it: PyTorch's classes, ours, their subclasses; changed
            in place. ``torch.compile`` and ``DistributedDataParallel`` wrappers are looked through.
        loader: any iterable of batches: tensors (N, …), ``(input, target)`` tuples, or dicts.
        samples: stop after the batch that completes this number of samples; None: use everything.
        mode: "joint" or "in-order", as described above. In "joint", a batch with one value per channel, by
            which no layer can normalise, is normalised by what has been pooled so far.
        forward_fn: ``forward_fn(model, batch)`` runs the model where its input is not the batch, its first
            element, or keywords.
        include_frozen: also recalibrate frozen layers: of a ``FrozenBatchNorm`` class, in evaluation inside a
            model in training, left in evaluation by the model's own ``train()``, or (in a model in
            evaluation) with no affine parameter that requires a gradient although others in the model do.
        merge_ranks: under ``torch.distributed``, pool the moments of all ranks, so that they end with
            identical statistics; every rank must then call this function, with as many batches as it has,
            even none.
        progress: called after each batch with its number of samples.

    Returns:
        ``model`` itself.

    Warns:
        NotCalibrated: names each layer that the data did not reach, that a model's own ``train()`` holds, or
            whose class is not understood.

    Raises:
        SurgeryError: no layer to recalibrate, no data, a single value per channel, non-finite moments, or a
            failure on another rank. The model is unchanged.
        UsageError: a bad argument, or a one-shot iterator for "in-order".
    """
    if mode not in ("joint", "in-order"):
        raise UsageError(f'mode must be "joint" or "in-order", not {mode!r}')
    check_model("recalibrate", model)
    check_batches("recalibrate", loader)
    inner = unwrap(model)
    layers, kept = to_measure(inner, include_frozen=include_frozen)
    passes = Passes(inner, loader, samples, forward_fn or call, progress, Ranks.here(merge_ranks), {})
    with preserved(inner, loader), torch.no_grad():
        set_modes(inner, training=False)
        new = passes.measure(layers, stop=False) if mode == "joint" else passes.measure_in_order(layers)
    finish(passes, layers, new, kept, "recalibrated")
    return model
