"""Timing on a GPU: device events, programs interleaved, buffers rotated so that no cache flatters."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
_CACHES = 4  # a rotation reads at least so many second-level caches' worth of inputs before it comes round
_COPY_BYTES = 1 << 30


def rotations(nbytes: int, cache_bytes: int) -> int:
    """How many sets of inputs of ``nbytes`` each to rotate among; at most 32, so that small cases stay so."""
    return max(2, min(32, -(-_CACHES * cache_bytes // max(1, nbytes))))


def milliseconds(call: Call) -> float:
    """Device time of one call, from the launch of the first of its kernels to the end of the last."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def capture(calls: Sequence[Call]) -> Call:
    """All calls as one CUDA graph, so that what is timed is the device and not Python; after a warm-up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def interleave(programs: Mapping[str, Sequence[Call]], rounds: int, graphs: bool) -> dict[str, float]:
    """Median milliseconds per call of each program; in a round every program runs all its calls once.

    Args:
        programs: name to one call for each set of inputs; every program has as many.
        rounds: after two that do not count.
        graphs: replay the calls as a CUDA graph (the device's time) instead of launching them (the user's
        time).
    """

    def all_of(calls: Sequence[Call]) -> Call:
        def run() -> None:
            for call in calls:
                call()

        return run

    ready = {name: capture(calls) if graphs else all_of(calls) for name, calls in programs.items()}
    found: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for turn in range(rounds + 2):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(milliseconds(ready[name]) / len(programs[name]))
    return {name: statistics.median(times[2:]) for name, times in found.items()}


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second, read and written, of a device copy too large for any cache."""
    a = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * _COPY_BYTES / (interleave({"copy": [lambda: b.copy_(a)]}, rounds, graphs=True)["copy"] * 1e-3)
