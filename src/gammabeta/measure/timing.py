"""Timing by interleaved rounds: every program runs in each, so that what disturbs one disturbs all."""

import gc
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

_FEWEST = 3  # rounds, whatever the time allowed: a median needs them


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over rounds, and the lower and upper quartile."""

    median: float
    lower: float
    upper: float
    rounds: int


def interleave(
    programs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    round_seconds: float = 0.01,
    seconds: float = float("inf"),
    clock: Callable[[], float] = perf_counter,
    progress: Callable[[float], object] = lambda _: None,
) -> dict[str, Timing]:
    """Time each program once per round, each round in another order, after one untimed call.

    Who runs before leaves caches and the C library's heap behind, so nobody follows the same program always;
    the orders are the same every time. Python's garbage collector is off meanwhile.

    Args:
        programs: what to time, by name.
        rounds: how many at most.
        round_seconds: a program shorter than this is called several times in a row, and the mean of those is
            the round's figure.
        seconds: after these no further round begins, once there are three.
        clock: where others use the machine, ``time.process_time`` gives the seconds of all threads together.
        progress: called after each round with the share that is done, up to 1.
    """
    repeats = {}
    for name, program in programs.items():
        program()
        start = clock()
        program()
        repeats[name] = max(1, min(1000, int(round_seconds / max(clock() - start, 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in programs}
    names, enabled, began = list(programs), gc.isenabled(), perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in random.Random(turn).sample(names, len(names)):
                start = clock()
                for _ in range(repeats[name]):
                    programs[name]()
                found[name].append((clock() - start) / repeats[name])
            spent = perf_counter() - began
            progress(min(1.0, max((turn + 1) / rounds, spent / seconds)))
            if spent > seconds and turn + 1 >= _FEWEST:
                break
    finally:
        if enabled:
            gc.enable()
    return {name: _summary(one) for name, one in found.items()}


def _summary(seconds: list[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(seconds))
