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

Run = Callable[[Tensor], Any]


def compare(model: nn.Module, run: Run, samples: int) -> tuple[float, float | None]:
    """How outputs in evaluation change the second time, and among other samples; None with one sample.

    Both in units of the output's standard deviation, and with the same random numbers drawn.
    """
    everyone = torch.arange(samples)
    together, drawn = _outputs(model, run, everyone)
    with preserved(model):
        _outputs(model, run, everyone, keep=False)
        again, _ = _outputs(model, run, everyone)
    repeated = largest_change(together, again)
    if samples < 2:
        return repeated, None

    def noise(seeds: tuple[int, ...]) -> float:
        return max(largest_change(together, _outputs(model, run, everyone, seed)[0]) for seed in seeds)

    if noise(OTHER_SEEDS[:1]):
        change, redrawn = _among_others(model, run, together, drawn)
        return repeated, change if not redrawn or change > TIMES_NOISE * noise(OTHER_SEEDS) else 0.0
    parts = [_outputs(model, run, index)[0] for index in torch.split(everyone, 2 if samples > 3 else 1)]
    return repeated, largest_change(together, [torch.cat(pieces) for pieces in zip(*parts, strict=True)])


def _among_others(model: nn.Module, run: Run, together: list[Tensor], drawn: Tensor) -> tuple[float, bool]:
    """The change when half of the batch is replaced by copies of the other half, and whether noise changed.

    The batch keeps its size and each sample its place, so each meets the noise that it met before. That fails
    where the amount drawn depends on the data, as in rejection sampling; the generator's state shows it.
    """
    samples = len(together[0]) if together else 0
    half = samples // 2
    everyone = torch.arange(samples)
    kept = (
        torch.cat([everyone[: samples - half], everyone[:half]]),
        torch.cat([everyone[samples - half :], everyone[:half], everyone[half:]])[-samples:],
    )
    change, redrawn = 0.0, False
    for index in kept:
        outputs, state = _outputs(model, run, index)
        same = index == everyone
        change = max(change, largest_change([t[same] for t in together], [t[same] for t in outputs]))
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
