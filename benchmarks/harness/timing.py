"""Timing by interleaved rounds: every program runs in each, so that what disturbs one disturbs all."""

import gc
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over rounds, and the lower and upper quartile."""

    median: float
    lower: float
    upper: float
    rounds: int


def interleave(
    programs: Mapping[str, Callable[[], object]], *, rounds: int = 15, round_seconds: float = 0.01
) -> dict[str, Timing]:
    """Time each program once per round, each round in another order, after one untimed call.

    Who runs before leaves caches and the C library's heap behind, so nobody follows the same program always;
    the orders are the same every time. A program shorter than ``round_seconds`` is called several times in a
    row and the mean of those is the round's figure; Python's garbage collector is off meanwhile.
    """
    repeats = {}
    for name, program in programs.items():
        program()
        start = perf_counter()
        program()
        repeats[name] = max(1, min(1000, int(round_seconds / max(perf_counter() - start, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in random.Random(turn).sample(names, len(names)):
                program = programs[name]
                start = perf_counter()
                for _ in range(repeats[name]):
                    program()
                seconds[name].append((perf_counter() - start) / repeats[name])
    finally:
        if enabled:
            gc.enable()
    return {name: _summary(found) for name, found in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(seconds))
