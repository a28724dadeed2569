"""How often the running statistics were updated: too few times, twice per step, not all alike."""

from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from ...stats.moments import Moments
from ..evidence import Evidence, Layer
from ..finding import RECALIBRATE, Finding
from .registry import check, check_layers

SHARE, EXCESS, SEVERE = 0.01, 0.1, 0.3


def measured_share(mean: Tensor, var: Tensor, population: Moments) -> float:
    """Share of the initial 0 and 1 in the statistics, by least squares over channels."""
    true_var = population.unbiased_variance.clamp(min=1e-30)
    toward = torch.cat([population.mean / true_var.sqrt(), (true_var - 1) / true_var])
    missing = torch.cat([(population.mean - mean) / true_var.sqrt(), (true_var - var) / true_var])
    return float((toward * missing).sum() / toward.square().sum().clamp(min=1e-30))


@check_layers(Evidence.updating)
def init_residue(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """The initial mean 0 and variance 1 still weigh in the running statistics.

    Symptom: a briefly trained model is worse in evaluation; more training cures it.
    Computation: an exponential average of weight ``momentum`` on the new value keeps ``(1 - momentum) **
    updates`` of its initial value. Given data, that share is also estimated from the statistics themselves,
    by least squares of (population - running) on (population - initial), both in units of the population's
    standard deviation.
    Threshold: 1 %, about the noise that batches of 64 leave in a variance averaged with momentum 0.1; or what
    is left of the initial variance 1 is 10 % of the median running variance (with small activations a share
    far below 1 % is enough for that). There is no finding where a running variance is below the share, or
    where the share estimated from data is under a quarter of the predicted one: such statistics were
    recalibrated. An error from 30 %, where the variance of a layer may be wrong by that much, if data
    confirms it.
    Fix: recalibrate, train longer, or use a larger momentum in short runs.
    Source: Kingma and Ba (2015), section 3, on the bias of an exponential average that starts from a
    constant.
    """
    if layer.trivial or not layer.updates or layer.momentum is None or not 0 < layer.momentum < 1:
        return
    share = (1 - layer.momentum) ** layer.updates
    mean, var = layer.running
    usual = float(var.median())
    if not (mean.isfinite().all() and var.isfinite().all()):
        return  # invalid-statistics has more to say
    excess = share / max(usual, 1e-30)
    if share <= SHARE and excess <= EXCESS:
        return
    if bool((var < share).any()):
        return  # an average that still holds that share of 1 could not be smaller
    seen = evidence.seen(layer)
    if seen is not None and measured_share(mean, var, seen.population) < share / 4:
        return
    yield Finding(
        "error" if max(share, excess) >= SEVERE and seen is not None else "warning",
        f"{share:.2g} of the initial mean 0 and variance 1 remain after {layer.updates} updates;"
        f" the median running variance is {usual:.2g}",
        f"too few updates for momentum {layer.momentum:g} to forget where it started",
        f"{RECALIBRATE}, or train longer" + ("" if seen else "; if it was recalibrated, give data"),
        {"share": share, "excess": excess, "updates": layer.updates},
    )


LOW, HIGH = 1.8, 2.2


@check_layers(Evidence.updating)
def double_update(layer: Layer, evidence: Evidence) -> Iterator[Finding]:
    """The running statistics are updated more than once per step.

    Symptom: statistics follow the last batches more closely than momentum says; evaluation is noisier.
    Computation: a forward and backward pass on two samples; a layer whose statistics change *during the
    backward* is run again by activation checkpointing. Without a backward pass: the updates per call, divided
    by the optimiser's steps.
    Threshold: any change of a bit in the backward is certain: a warning. A ratio between 1.8 and 2.2 is a
    note only: gradient accumulation over two batches gives it in a healthy model, and so does a discriminator
    that sees a real and a generated batch per step.
    Fix: let the recomputation skip the update (``gammabeta.nn`` layers do), or halve the momentum.
    Source: ``torch.utils.checkpoint``: the forward runs again during the backward, in both of its modes.
    """
    steps = evidence.optimizer.steps if evidence.optimizer is not None else None
    if layer.name in (evidence.updated_in_backward or ()):
        yield Finding(
            "warning",
            "the running statistics change during the backward pass",
            "activation checkpointing runs the layer's forward again, and updates again",
            "our layers skip the second one: `model = gammabeta.convert(model)`; or 1 - sqrt(1 - momentum)",
        )
    elif steps and layer.updates and evidence.updated_in_backward is None:
        ratio = layer.updates / (steps * (evidence.around(layer).calls or 1))
        if LOW <= ratio <= HIGH:
            yield Finding(
                "note",
                f"{layer.updates} updates in {steps} optimiser steps",
                "activation checkpointing; or two forward passes per step, which is fine",
                "give an example: a backward pass on it shows which of the two it is",
                {"ratio": ratio},
            )


TOLERANCE = 0.02


@check
def unequal_updates(evidence: Evidence) -> Iterator[Finding]:
    """Layers that are trained together have been updated a different number of times.

    Symptom: some layers' statistics are older than others'.
    Computation: ``num_batches_tracked`` divided by the layer's calls per forward pass, compared among the
    layers under the same child of the model.
    Threshold: any difference above 2 %. A warning among layers of one part of the model when the calls are
    known; a note between parts (a new head on a trained backbone, a generator beside its discriminator) or
    where the calls are not known, since a reused layer counts every call, or vary with the batch (layers that
    are called for each part of it) or by chance (layers that are skipped at random).
    Fix: find out which layers were skipped, frozen for a while, checkpointed, or restored from another file.
    Source: ``torch.nn.BatchNorm2d``: one count per call in training.
    """
    parts: dict[str, list[tuple[Layer, float]]] = {}
    for layer in evidence.updating():
        if layer.updates:
            part = layer.name.rpartition(".")[0].partition(".")[0]
            parts.setdefault(part, []).append((layer, layer.updates / (evidence.around(layer).calls or 1)))
    usual = {part: median(count for _, count in members) for part, members in parts.items()}
    for part, members in parts.items():
        for layer, count in members:
            if abs(count / usual[part] - 1) > TOLERANCE:
                known = all(_calls_known(evidence, other) for other, _ in members)
                yield Finding(
                    "warning" if known else "note",
                    f"{count:g} updates per call, where its neighbours have {usual[part]:g}",
                    "skipped, frozen for a while, checkpointed, or restored from another file",
                    f"{RECALIBRATE}, so that all statistics come from the same weights",
                    {"updates": count, "usual": usual[part]},
                    layer=layer.name,
                )
    if usual and max(usual.values()) / min(usual.values()) > 1 + TOLERANCE:
        counts = ", ".join(f"{part or 'top level'}: {count:g}" for part, count in usual.items())
        yield Finding(
            "note",
            f"parts of the model were updated a different number of times ({counts})",
            "parts trained apart, or run a different number of times per step",
            "nothing, if this is intended",
        )


def _calls_known(evidence: Evidence, layer: Layer) -> bool:
    around = evidence.around(layer)
    return bool(around.calls) and not around.calls_vary
