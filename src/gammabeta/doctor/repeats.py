"""The same samples evaluated again: with the same noise, with other noise, and among other samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..stats.preserve import preserved, same_bits
from .noise import drawn_from
from .trace import tensors

OTHER_SEEDS = (1, 2, 3, 4)
TIMES_NOISE = 2.0
ROUNDING = 0.05  # of half precision in kernels for other shapes, of the output's deviation

Run = Callable[[Tensor], Any]


def compare(model: nn.Module, run: Run, chosen: Tensor, *, ragged: bool) -> tuple[float, float | None]:
    """How outputs in evaluation change the second time, and among other samples; None with one sample.

    Both in units of the output's standard deviation, and with the same random numbers drawn. ``ragged``: the
    first of the ``chosen`` samples is the largest, and it alone is compared, as the others may be padded.
    """
    together, drawn = _outputs(model, run, chosen)
    with preserved(model):
        _outputs(model, run, chosen, keep=False)
        again, _ = _outputs(model, run, chosen)
    repeated = largest_change(together, again)
    if len(chosen) < 2:
        return repeated, None

    def noise(seeds: tuple[int, ...]) -> float:
        return max(largest_change(together, _outputs(model, run, chosen, seed)[0]) for seed in seeds)

    change, redrawn = _among_others(model, run, together, drawn, chosen, ragged)
    if noise(OTHER_SEEDS[:1]):
        return repeated, change if not redrawn or change > TIMES_NOISE * noise(OTHER_SEEDS) else 0.0
    cut = _in_smaller_batches(model, run, together, chosen, ragged)
    return repeated, cut if cut > ROUNDING else change


def _in_smaller_batches(
    model: nn.Module, run: Run, together: list[Tensor], chosen: Tensor, ragged: bool
) -> float:
    """The change when the samples come in twos, or one by one where there are few."""
    if ragged:
        pairs = [chosen[[0, index]] for index in range(1, len(chosen))]
        return max(_change_of_first(together, _outputs(model, run, pair)[0]) for pair in [chosen[:1], *pairs])
    parts = [_outputs(model, run, index)[0] for index in torch.split(chosen, 2 if len(chosen) > 3 else 1)]
    return largest_change(together, [torch.cat(pieces) for pieces in zip(*parts, strict=True)])


def _change_of_first(together: list[Tensor], others: list[Tensor]) -> float:
    """By how much the first row differs, in units of the deviation over all rows."""
    pairs = [(rows, other) for rows, other in zip(together, others, strict=False) if len(other)]
    fitting = [(rows, other) for rows, other in pairs if rows.shape[1:] == other.shape[1:]]
    moved = [torch.cat([other[:1], rows[1:]]) for rows, other in fitting]
    return largest_change([rows for rows, _ in fitting], moved)


def _among_others(
    model: nn.Module, run: Run, together: list[Tensor], drawn: Tensor, chosen: Tensor, ragged: bool
) -> tuple[float, bool]:
    """The change when half of the batch is replaced by copies of the other half, and whether noise changed.

    The batch keeps its size and each sample its place, so each meets the noise that it met before. That fails
    where the amount drawn depends on the data, as in rejection sampling; the generator's state shows it.
    """
    samples = len(chosen)
    half = samples // 2
    kept = (
        torch.cat([chosen[: samples - half], chosen[:half]]),
        torch.cat([chosen[samples - half :], chosen[:half], chosen[half:]])[-samples:],
    )
    change, redrawn = 0.0, False
    for index in kept:
        same = index == chosen
        if ragged:
            if not same[0]:
                continue
            same = torch.arange(samples) == 0
        outputs, state = _outputs(model, run, index)
        for before, after in zip(together, outputs, strict=False):
            if before.shape == after.shape:
                moved = torch.where(same.view(-1, *[1] * (after.dim() - 1)).to(after.device), after, before)
                change = max(change, largest_change([before], [moved]))
        redrawn |= not torch.equal(state, drawn)
    return change, redrawn


def _outputs(
    model: nn.Module, run: Run, index: Tensor, seed: int = 0, *, keep: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Outputs for some samples, a row for each, from the same buffers; and the generator's state after it."""
    if keep:
        with preserved(model):
            return _outputs(model, run, index, seed, keep=False)
    with torch.no_grad(), drawn_from(seed, model):
        found = tensors(run(index))
        state = torch.get_rng_state()
    return [t[: len(index)].double() for t in found if t.dim() and t.shape[0] == len(index)], state


def largest_change(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest absolute difference, in units of the output's standard deviation."""
    changes = [0.0]
    for a, b in zip(one, other, strict=False):
        if a.shape == b.shape and a.numel() and not same_bits(a, b):
            spread = float(a.std()) if a.numel() > 1 else 0.0
            largest = float((a - b).abs().max())
            changes.append(largest / max(spread, float(a.abs().max()) * 1e-6, 1e-30))
    return max(changes)
