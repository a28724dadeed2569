"""Where a kernel begins to pay: ``functional.batch_norm`` on small inputs, by each road, beside torch.

``python benchmarks/small_inputs.py`` prints microseconds, medians of interleaved calls, as a Markdown table:
torch, ours with torch's operator, ours with the kernel. Outputs are compared before anything is timed. The
thresholds in ``gammabeta.functional.step`` are read off it.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gammabeta.functional import batch_norm, route

SHAPES = [
    (64, 128),
    (64, 256),
    (256, 256),
    (64, 50, 4, 4),
    (8, 48, 16, 16),
    (8, 64, 16, 16),
    (8, 128, 16, 16),
    (8, 128, 28, 28),
]
ROUNDS = 200
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def interleaved(functions: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Median microseconds of each."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, kept in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return [sorted(kept)[ROUNDS // 2] * 1e6 for kept in times]


def always(road: str) -> None:
    """Send every input along one road."""
    most = 0 if road == "kernel" else 1 << 60
    for thresholds in (route.SMALL_TRAIN, route.SMALL_EVAL):
        thresholds[:] = [most] * 3


def case(shape: tuple[int, ...], training: bool, activation: str | None) -> list[float]:
    """One cell of the table: torch, the small road, the kernel."""
    channels = shape[1]
    x = torch.randn(shape, requires_grad=training)
    weight, bias = (torch.rand(channels, requires_grad=training) for _ in range(2))
    mean, var, grad = torch.zeros(channels), torch.ones(channels), torch.randn(shape)

    def finish(out: Tensor) -> Tensor:
        if training:
            torch.autograd.backward(out, grad)
        return out

    def theirs() -> Tensor:
        out = F.batch_norm(x, mean, var, weight, bias, training)
        return finish(out if activation is None else F.relu(out, inplace=True))

    def ours(road: str) -> Tensor:
        always(road)
        return finish(batch_norm(x, mean, var, weight, bias, training, activation=activation))

    expected = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)
    expected = expected if activation is None else F.relu(expected)
    for road in ("small", "kernel"):
        mean.zero_(), var.fill_(1)
        torch.testing.assert_close(ours(road), expected, **CLOSE)
        mean.zero_(), var.fill_(1)
    return interleaved([theirs, lambda: ours("small"), lambda: ours("kernel")])


def main() -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    heads = ["training", "training, ReLU", "evaluation", "evaluation, ReLU"]
    print("| shape | KB | " + " | ".join(f"{h}: torch / small / kernel" for h in heads) + " |")
    print("|---" * 6 + "|")
    for shape in SHAPES:
        cells = []
        for training in (True, False):
            for activation in (None, "relu"):
                times = case(shape, training, activation)
                cells.append(" / ".join(f"{t:.0f}" for t in times))
        size = "×".join(map(str, shape))
        print(f"| {size} | {torch.Size(shape).numel() * 4 // 1024} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
