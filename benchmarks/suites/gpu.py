"""The GPU suite: checks every layer, then times it; then a ResNet-50 step; then the digit network.

Needs torch and Triton only (the digit network: the package's own requirements too). Times of layers are the
device's, from CUDA graphs over rotating buffers; `launched` is the same without a graph, as an eager user has
it.
"""

import argparse
import json
import sys
from statistics import geometric_mean
from typing import Any

import torch

from gammabeta.epilogue import Epilogue
from gammabeta.errors import UnavailableError
from gammabeta.kernels.backend import Call, Normalized

from ..harness import Options, Result
from .gpu_layers import Case, Layer, cases, check, fewest_bytes, our_program, torch_program
from .gpu_models import digits, resnet_step
from .gpu_timing import copy_bandwidth, interleave, rotations

PARTS = ("layers", "resnet", "digits")
_LARGE = 64 << 20  # bytes beyond which the share of the copy's bandwidth is judged
_ROUNDS = 30
_QUICK_ROUNDS = 5
_NOTE = (
    "Forward and backward of one layer in training mode, allocation included, in CUDA graphs over rotating "
    "buffers; medians of interleaved rounds. `GB/s` and `of copy` count the fewest bytes: every input read "
    "once, every output written once. `launched`: the same without a graph."
)


def gpu_device() -> torch.device:
    """The current CUDA device.

    Raises:
        UnavailableError: there is none that the kernels run on, in one line.
    """
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        raise UnavailableError(f"the gpu suite needs an NVIDIA GPU, and this PyTorch {why}")
    from gammabeta.functional import explain

    device = torch.device("cuda", torch.cuda.current_device())
    explain(torch.empty(2, 2, device=device), None, None, training=True, backend="gpu")
    return device


def measure(
    case: Case, device: torch.device, bandwidth: float, cache_bytes: int, rounds: int
) -> dict[str, Any]:
    """Check one layer, then time it: a row of the table."""
    ours, eager = our_program(case), torch_program(case, inplace=True)
    compiled = torch.compile(torch_program(case, inplace=False), dynamic=False)
    count = rotations(fewest_bytes(case), cache_bytes)
    layers = [Layer(case, device, seed) for seed in range(count)]
    check(layers[0], ours, eager)
    check(layers[0], compiled, eager, slack=8.0)
    programs = {
        name: [lambda layer=layer, program=program: layer.step(program) for layer in layers]
        for name, program in (("ours", ours), ("eager", eager), ("compiled", compiled))
    }
    launched = interleave(programs, rounds, graphs=False)
    times = interleave(programs | _parts(case, layers), rounds, graphs=True)
    rates = {
        part: fewest_bytes(case, part) / (times[name] * 1e-3)
        for part, name in (("step", "ours"), ("forward", "forward"), ("backward", "backward"))
    }
    return {
        "case": case.title,
        "operation": case.operation,
        "MB": case.nbytes / 1e6,
        "eager ms": times["eager"],
        "compiled ms": times["compiled"],
        "ours ms": times["ours"],
        "eager / ours": times["eager"] / times["ours"],
        "compiled / ours": times["compiled"] / times["ours"],
        "GB/s": rates["step"] / 1e9,
        "of copy": rates["step"] / bandwidth,
        "forward of copy": rates["forward"] / bandwidth,
        "backward of copy": rates["backward"] / bandwidth,
        "launched: eager / ours": launched["eager"] / launched["ours"],
        "launched: compiled / ours": launched["compiled"] / launched["ours"],
    }


def _parts(case: Case, layers: list[Layer]) -> dict[str, Any]:
    """The kernels alone, for bandwidth: forward in training, and backward."""
    from gammabeta.kernels.gpu import host

    def call(t: Layer) -> Call:
        return Call(t.x.detach(), t.weight, t.bias, t.residual, Epilogue(case.activation), 1e-5)

    def forward(t: Layer) -> Any:
        return host.forward_train(call(t))

    def backward(t: Layer, mean: Any, invstd: Any) -> Any:
        return host.backward(t.grad, Normalized(call(t), mean, invstd), case.added)

    with torch.no_grad():
        statistics = [forward(t)[1::2] for t in layers]
    return {
        "forward": [lambda t=t: forward(t) for t in layers],
        "backward": [lambda t=t, s=s: backward(t, *s) for t, s in zip(layers, statistics, strict=True)],
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means per operation; the worst and mean share of the copy's bandwidth on large tensors."""
    found: dict[str, Any] = {}
    peers = ("eager / ours", "compiled / ours")
    for operation in dict.fromkeys(row["operation"] for row in rows):
        here = {peer: [row[peer] for row in rows if row["operation"] == operation] for peer in peers}
        said = (f"{peer} {geometric_mean(r):.2f}× (least {min(r):.2f}×)" for peer, r in here.items())
        found[operation] = ", ".join(said)
    large = [row for row in rows if row["MB"] * 1e6 > _LARGE]
    for part in ("of copy", "forward of copy", "backward of copy") if large else ():
        shares = [100 * row[part] for row in large]
        found[f"above 64 MiB, {part}"] = f"mean {geometric_mean(shares):.0f} %, least {min(shares):.0f} %"
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Parts and cases to choose, where a machine is lent for minutes."""
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="only this part; may be given again; default: all"
    )
    parser.add_argument("--case", default="", help="only layers whose title contains this")


def run(options: Options) -> Result:
    """Check and time everything, or the parts asked for; each row is told to standard error as it is found.

    Raises:
        UnavailableError: no CUDA device.
        IncorrectError: a layer, a model or a training gives a wrong result.
    """
    device = gpu_device()
    parts = getattr(options.given, "part", None) or PARTS
    rounds = _QUICK_ROUNDS if options.quick else _ROUNDS
    properties = torch.cuda.get_device_properties(device)
    bandwidth = copy_bandwidth(device, rounds)
    summary: dict[str, Any] = {"device copy": f"{bandwidth / 1e9:.0f} GB/s, read and written"}
    rows: list[dict[str, Any]] = []
    if "layers" in parts:
        wanted = getattr(options.given, "case", "")
        for case in (case for case in cases(options.quick) if wanted in case.title):
            torch.compiler.reset()
            rows.append(measure(case, device, bandwidth, properties.L2_cache_size, rounds))
            print(json.dumps(rows[-1]), file=sys.stderr)
            torch.cuda.empty_cache()
        summary |= summarise(rows)
    if "resnet" in parts:
        torch.compiler.reset()
        summary |= resnet_step(device, 64 if options.quick else 256, rounds)
    if "digits" in parts:
        summary |= digits(1 if options.quick else 10)
    return Result("Batch normalization on a GPU", rows, summary, [_NOTE], machine=properties.name)
