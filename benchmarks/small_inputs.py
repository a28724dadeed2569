"""Where a kernel begins to pay: ``functional.batch_norm`` on small inputs, by each path, beside torch.

``python benchmarks/small_inputs.py`` prints microseconds, medians of interleaved calls, as a Markdown table:
torch, ours with torch's operator, ours with the kernel. Outputs are compared before anything is timed. The
thresholds in ``gammabeta.functional.step`` are read off it.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.timing import interleave
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


def always(path: str) -> None:
    """Serve every input by one path: torch's operator (``small``) or the kernel."""
    most = 0 if path == "kernel" else 1 << 60
    for thresholds in (route.SMALL_TRAIN, route.SMALL_EVAL):
        thresholds[:] = [most] * 3


def case(shape: tuple[int, ...], training: bool, activation: str | None) -> list[float]:
    """One cell of the table: microseconds of torch, ours with torch's operator, ours with the kernel."""
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

    def ours(path: str) -> Tensor:
        always(path)
        return finish(batch_norm(x, mean, var, weight, bias, training, activation=activation))

    expected = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)
    expected = expected if activation is None else F.relu(expected)
    for path in ("small", "kernel"):
        mean.zero_(), var.fill_(1)
        torch.testing.assert_close(ours(path), expected, **CLOSE)
        mean.zero_(), var.fill_(1)
    programs = {"torch": theirs, "small": lambda: ours("small"), "kernel": lambda: ours("kernel")}
    return [t.median * 1e6 for t in interleave(programs, rounds=ROUNDS, round_seconds=0).values()]


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
