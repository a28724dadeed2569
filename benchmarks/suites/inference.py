"""Serving the digit network: in evaluation mode, folded, compiled, as ONNX, and by torch.fx's fuser.

The network is trained first, so that its statistics are real. Every program must give the prediction of the
evaluation-mode network on all 10,000 test images before any is timed. Inputs: ``(N, 1, 28, 28)`` float32.
"""

import copy
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gammabeta import data
from gammabeta import nn as gbnn
from gammabeta.errors import UnavailableError
from gammabeta.export import export_onnx
from gammabeta.folding import fold
from gammabeta.train.batches import DeviceImages, Scaling
from gammabeta.train.fitting import fit
from gammabeta.train.network import DigitNetwork
from gammabeta.train.recipe import load_recipe

from ..harness import IncorrectError, Options, Result
from ..harness.timing import Timing, interleave

_COLUMN = "times faster than evaluation mode, channels_last"
BATCHES = (1, 256)
OPPONENTS = ("evaluation mode", "evaluation mode, channels_last")
Program = Callable[[Tensor], Tensor]


def run(options: Options) -> Result:
    """Train, check every program on the test images, time them side by side at each batch size."""
    network, images = _trained(options)
    programs = _programs(network)
    wanted = _predictions(programs["evaluation mode"], images, 500)
    for name, program in programs.items():
        _check(name, program, images, wanted)
    rows, ratios = [], {}
    for batch in BATCHES:
        x = images[:batch].clone()
        times = _time(programs, x, options)
        for name in OPPONENTS:
            ratios[f"folded: times faster than {name}, batch {batch}"] = (
                times[name].median / times["folded"].median
            )
        rows += [_row(name, batch, time, times[OPPONENTS[1]].median) for name, time in times.items()]
    return Result(
        title="Serving the digit network",
        rows=rows,
        summary={"test images with identical predictions, every program": len(images), **ratios},
        notes=[
            "The last column is against the same network in evaluation mode with channels_last weights, what "
            "`load_model` gives: batch norm, ReLU and pooling are one fused pass there already. `folded`: "
            "`gb.fold(network, example)`, nothing else asked for; `not packed`: the same with `pack=False`. "
            "`torch.nn` is the network written with torch's own layers and the same weights. Every program "
            "is given the same contiguous images and runs under `torch.inference_mode`, in a process that "
            "has trained nothing. Medians of interleaved rounds; ONNX Runtime has rounds of its own, as its "
            "threads go on spinning after a call. IQR is the interquartile range."
        ],
        chart=_COLUMN,
    )


def _trained(options: Options) -> tuple[nn.Module, Tensor]:
    """Return the network in evaluation mode, contiguous, and the test images as its input.

    It is trained in another process: training changes how this one's allocator treats large blocks.
    """
    recipe = load_recipe("fast")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        child = multiprocessing.get_context("spawn").Process(target=_train, args=(str(path), options.quick))
        child.start()
        child.join()
        if not path.is_file():
            raise UnavailableError("the network to serve could not be trained")
        weights = torch.load(path, weights_only=True)
    network = DigitNetwork().eval()
    network.load_state_dict(weights)
    dataset = data.load("mnist")
    scaling = Scaling.of(dataset.train.images, recipe.pixels)
    held = DeviceImages(dataset.test, scaling, torch.device("cpu"))
    x, _ = held.batch(slice(None))
    return network, x.contiguous()


def _train(path: str, quick: bool) -> None:
    """Train by the recipe ``fast`` and save the weights."""
    torch.manual_seed(0)
    recipe = load_recipe("fast")
    if quick:
        recipe = recipe.model_copy(update={"epochs": 0.05})
    model = fit(DigitNetwork(), data.load("mnist"), recipe, device="cpu").model
    torch.save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def _programs(network: nn.Module) -> dict[str, Program]:
    example = torch.randn(2, 1, 28, 28)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    not_packed = fold(network, example, memory_format=torch.channels_last, pack=False)
    plain = _with_torch_layers(network)
    plain_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {
        "evaluation mode": network,
        "evaluation mode, channels_last": last,
        "torch.nn, evaluation mode": plain,
        "torch.nn, evaluation mode, channels_last": plain_last,
        "torch.nn, torch.fx fuse, channels_last": _fused_by_fx(plain_last),
        "folded": fold(network, example),
        "folded, not packed": fold(network, example, pack=False),
        "folded, not packed, channels_last": not_packed,
        "folded, not packed, channels_last, compiled": torch.compile(
            copy.deepcopy(not_packed), dynamic=False
        ),
        "ONNX Runtime": _onnx(network, example),
    }


def _with_torch_layers(network: nn.Module) -> nn.Module:
    """Write the same network with torch's own layers, sharing the weights."""
    parts = dict(network.named_children())

    def norm(name: str) -> nn.Module:
        ours = parts[name]
        assert isinstance(ours, gbnn.BatchNorm1d | gbnn.BatchNorm2d)
        kind = nn.BatchNorm1d if isinstance(ours, nn.BatchNorm1d) else nn.BatchNorm2d
        theirs = kind(ours.num_features, eps=ours.eps)
        theirs.load_state_dict(ours.state_dict())
        return theirs

    return nn.Sequential(
        *(parts["conv1"], norm("bn1"), nn.ReLU(inplace=True), nn.AvgPool2d(2)),
        *(parts["conv2"], norm("bn2"), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten()),
        *(parts["fc1"], norm("bn3"), nn.ReLU(inplace=True), parts["fc2"]),
    ).eval()


def _fused_by_fx(model: nn.Module) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental import optimization

    fused: Program = optimization.fuse(copy.deepcopy(model))
    return fused


def _onnx(network: nn.Module, example: Tensor) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(network, path, example)
        content = path.read_bytes()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def program(x: Tensor) -> Tensor:
        found: list[np.ndarray] = session.run(None, {"input": x.numpy()})
        return torch.from_numpy(found[0])

    return program


def _predictions(program: Program, images: Tensor, batch: int) -> Tensor:
    with torch.inference_mode():
        return torch.cat([program(x).argmax(1) for x in images.split(batch)])


def _check(name: str, program: Program, images: Tensor, wanted: Tensor) -> None:
    for batch in (250, 1):  # as one of many, and alone
        some = images if batch > 1 else images[:50]
        found = _predictions(program, some, batch)
        differ = int((found != wanted[: len(found)]).sum())
        if differ:
            raise IncorrectError(f"{name}: {differ} of {len(found)} test images get another prediction")


def _time(programs: dict[str, Program], x: Tensor, options: Options) -> dict[str, Timing]:
    def call(program: Program) -> Callable[[], object]:
        def once() -> object:
            with torch.inference_mode():
                return program(x)

        return once

    calls = {name: call(program) for name, program in programs.items()}
    rounds = 3 if options.quick else 31
    # ONNX Runtime's threads go on spinning after a call and slow what runs next: it has rounds of its own.
    apart = {"ONNX Runtime": calls.pop("ONNX Runtime")}
    return interleave(calls, rounds=rounds, round_seconds=0.05) | interleave(
        apart, rounds=rounds, round_seconds=0.05
    )


def _row(name: str, batch: int, time: Timing, base: float) -> dict[str, object]:
    return {
        "case": f"{name}, batch {batch}",
        "batch": batch,
        "µs": time.median * 1e6,
        "IQR µs": (time.upper - time.lower) * 1e6,
        "images/s": round(batch / time.median),
        _COLUMN: base / time.median,
    }
