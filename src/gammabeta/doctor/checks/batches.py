"""The batches that a loader gives: too small, a last one of one sample, not shuffled."""

import math
from collections.abc import Iterator
from statistics import median

import torch

from ..evidence import Activity, Evidence, Layer
from ..finding import Finding, Severity
from .registry import check, check_layers

FEW_IMAGES, FEW_VALUES, ENOUGH_PER_PROCESS = 8, 16, 16
UNCERTAIN, TO_TELL = 0.1, 8


@check
def tiny_batch(evidence: Evidence) -> Iterator[Finding]:
    """Too few samples or values per channel to estimate a mean and a variance from.

    Symptom: noisy training, a gap between training and evaluation, results that depend on the batch size.
    Computation: the median over the loader's batches of the samples per batch and of the values per channel.
    From eight batches on also how uncertain their means and variances are: their standard deviations over
    the batches, beside the channel's own deviation and variance (root mean square over channels).
    Threshold: fewer than 8 samples (Wu and He measure a loss of 1 percentage point of ImageNet accuracy at 8,
    3.5 at 4 and 11 at 2), or fewer than 16 values, where a variance is uncertain by sqrt(2/15), more than a
    third. Few samples are a note where no layer's means and variances are uncertain by more than 10 %, as of
    200 independent values: such are a few large maps. In batches of four, the models of the fault bench are
    uncertain by 18 % and more.
    Fix: larger batches; synchronised statistics; frozen statistics when fine-tuning; GroupNorm for new
    models.
    Source: Wu and He (2018), "Group normalization", table 2.
    """
    learning = [layer for layer in evidence.layers if not layer.frozen]
    if not learning or not evidence.batch_images:
        return
    images = median(evidence.batch_images)
    if images < FEW_IMAGES:
        known = [uncertainty(seen) for layer in learning if (seen := evidence.seen(layer)) is not None]
        worst = max(known, default=math.inf)
        found = f"the loader's batches have {images:g} sample{'s' * (images != 1)}"
        if worst < math.inf:
            found += f"; their statistics are uncertain by up to {worst:.0%}"
        yield _finding(found, images, severity="note" if worst <= UNCERTAIN else "warning")
        return
    for layer in learning:
        seen = evidence.seen(layer)
        values = median(size.values for size in seen.sizes.elements()) if seen is not None else FEW_VALUES
        if values < FEW_VALUES:
            yield _finding(f"{values:g} values per channel in a batch", values, layer.name)


def uncertainty(seen: Activity) -> float:
    """How far batches' means and variances scatter, in the channel's own; infinite where nobody knows."""
    if seen.batch_means.count < TO_TELL:
        return math.inf
    variance = seen.population.variance
    live = variance > 1e-12
    if not bool(live.any()):
        return 0.0
    means = seen.batch_means.unbiased_variance[live] / variance[live]
    variances = seen.batch_variances.unbiased_variance[live] / variance[live].square()
    return math.sqrt(float(torch.stack([means.mean(), variances.mean()]).max()))


def _finding(evidence: str, count: float, name: str = "", severity: Severity = "warning") -> Finding:
    return Finding(
        severity,
        evidence,
        "a batch size chosen for memory; if this loader is only for evaluation, ignore this",
        "larger batches, synchronised or frozen statistics",
        {"count": count},
        layer=name,
    )


@check_layers()
def unsynchronized_replicas(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """Each process normalises by its own small batch.

    Symptom: distributed training that is worse than the same total batch on one device.
    Computation: more than one process, a layer that does not synchronise, and the median of the local batch
    sizes.
    Threshold: fewer than 16 samples per process: Wu and He measure no loss from 32 to 16, 1 percentage point
    of ImageNet accuracy at 8, and 11 at 2. A note where the batch size is not known.
    Fix: ``gammabeta.convert(model, to="sync")``.
    Source: Wu and He (2018), "Group normalization", table 2; Peng et al. (2018), "MegDet".
    """
    if evidence.ranks is None or layer.synchronized or layer.frozen:
        return
    local = median(evidence.batch_images) if evidence.batch_images else None
    if local is None or local < ENOUGH_PER_PROCESS:
        size = "an unknown number of" if local is None else f"{local:g}"
        yield Finding(
            "note" if local is None else "warning",
            f"{evidence.ranks.world_size} processes normalise by {size} samples each",
            "DistributedDataParallel averages gradients, not statistics",
            'synchronise: `model = gammabeta.convert(model, to="sync")`',
        )


@check
def last_batch_of_one(evidence: Evidence) -> Iterator[Finding]:
    """The last batch of an epoch leaves one value per channel.

    Symptom: "Expected more than 1 value per channel when training", at the end of the first epoch.
    Computation: the loader's length, batch size and ``drop_last``; or, given data, a last batch of one sample
    after larger ones.
    Threshold: exactly one sample left. A warning when some layer gets one value per sample (after pooling or
    in fully connected layers), which raises; a note otherwise, since that batch's statistics are merely poor.
    Fix: ``drop_last=True``, or a batch size that leaves another remainder.
    Source: ``torch.nn.functional.batch_norm``.
    """
    loader, sizes = evidence.loader, evidence.batch_images
    if loader is not None and loader.leaves_one:
        found = f"{loader.samples} samples in batches of {loader.batch_size} leaves one sample"
    elif sizes and sizes[-1] == 1 and max(sizes) > 1:
        found = "the last batch leaves one sample"
    else:
        return
    bare = [layer.label for layer in evidence.layers if _one_value_per_sample(evidence, layer)]
    if bare:
        found += f"; one value per channel in {', '.join(bare[:3])}"
    if evidence.layers:
        yield Finding(
            "warning" if bare else "note",
            found,
            "the number of samples is one more than a multiple of the batch size",
            "leave it out in training: `DataLoader(data, batch_size, shuffle=True, drop_last=True)`",
        )


def _one_value_per_sample(evidence: Evidence, layer: Layer) -> bool:
    seen = evidence.seen(layer)
    if seen is None:
        return "1d" in layer.kind
    return any(size.values <= size.images for size in seen.sizes)


LEAST_BATCHES, RATIO, SIGMAS = 4, 3.0, 5.0


@check
def non_iid_batches(evidence: Evidence) -> Iterator[Finding]:
    """Batches differ from one another more than chance allows.

    Symptom: training goes well and evaluation badly: the network learns what the samples of a batch have in
    common.
    Computation: in evaluation, where a sample's activations do not depend on its batch: the variance of the
    samples' means between batches, divided by that within batches (the F statistic of a one-way analysis of
    variance), averaged over channels; the layer where it is largest.
    Threshold: above 3, and five standard deviations above what chance gives even if all channels move
    together (Wilson and Hilferty's cube root). Shuffled data gives 1 on average; data sorted by class far
    more than 3.
    Fix: shuffle; mix sources within each batch; one batch normalization per domain where they must stay
    apart.
    Source: Wu and Johnson (2021), section 5 (batches from different domains); Fisher's analysis of variance.
    """
    ratios = {}
    for layer in evidence.layers:
        seen = evidence.seen(layer)
        if seen is not None:
            ratio = variance_ratio(seen)
            if ratio is not None and _surprise(ratio, seen.eval_batches - 1) > SIGMAS:
                ratios[layer.name] = ratio
    if ratios and max(ratios.values()) > RATIO:
        name = max(ratios, key=lambda key: ratios[key])
        yield Finding(
            "warning",
            f"the means of batches vary {ratios[name]:.1f} times as much as in batches drawn at random",
            "data in order of class, of recording or of source; no shuffling",
            "shuffle training data: `DataLoader(data, batch_size, shuffle=True)`; in evaluation, ignore this",
            {"ratio": ratios[name]},
            layer=name,
        )


def variance_ratio(seen: Activity) -> float | None:
    """F: mean square between batches over mean square within, averaged over live channels."""
    batches, images = seen.eval_batches, seen.image_means.count
    if batches < LEAST_BATCHES or images < 2 * batches:
        return None
    within = seen.image_means_within / (images - batches)
    between = (seen.image_means.m2 - seen.image_means_within) / (batches - 1)
    live = within > 1e-12
    return float((between[live] / within[live]).mean()) if bool(live.any()) else None


def _surprise(ratio: float, freedom: int) -> float:
    """Standard deviations beyond chance, of a chi-square over its ``freedom`` (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return float((math.cbrt(max(ratio, 0.0)) - (1 - spread)) / math.sqrt(spread))
