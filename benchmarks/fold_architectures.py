"""Fold public architectures, and compare with what torch.fx's fuser folds.

Run in an environment that has, beside gammabeta, any of: pytorchcv, monai, efficientnet-pytorch,
transformers, dcgan-pytorch (none needs torchvision when installed with ``--no-deps``). What is not installed
is skipped, and said.

    python benchmarks/fold_architectures.py [--docs docs/fold.md] [--rounding INPUTS] [NAME ...]

Weights are random; the running statistics come from training-mode passes over random inputs, and γ and β are
drawn, so that no batch norm is the identity. Nothing is downloaded.
"""

import argparse
import copy
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gammabeta as gb
from benchmarks.harness.report import table, write_between
from gammabeta.folding.verify import Inputs, distance, run

Shape = tuple[int, ...]
Builder = Callable[[], nn.Module]
SMALL: Shape = (2, 3, 64, 64)
IMAGE: Shape = (1, 3, 224, 224)
VOLUME: Shape = (2, 1, 32, 32, 32)
_UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (8, 16, 32), "strides": (2, 2)}
_CITY = {"in_size": (64, 64)}


def _cv(module: str, name: str, **options: Any) -> Builder:
    return lambda: getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)(**options)


def _monai(name: str, **options: Any) -> Builder:
    return lambda: getattr(importlib.import_module("monai.networks.nets"), name)(**options)


def _transformer(name: str) -> Builder:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        config = getattr(library, f"{name}Config")(return_dict=False)
        model: nn.Module = getattr(library, f"{name}ForImageClassification")(config)
        return model

    return build


def _efficientnet() -> nn.Module:
    module = importlib.import_module("efficientnet_pytorch")
    model: nn.Module = module.EfficientNet.from_name("efficientnet-b0")
    model.set_swish(memory_efficient=False)
    return model


def _dcgan(name: str, size: str) -> Builder:
    return lambda: getattr(importlib.import_module("dcgan_pytorch.model"), name).from_name(size)


# name → (what it stands for, builder, input shape)
ARCHITECTURES: dict[str, tuple[str, Builder, Shape]] = {
    "pytorchcv resnet18": ("residual", _cv("resnet", "resnet18"), IMAGE),
    "pytorchcv preresnet18": ("pre-activation ResNet", _cv("preresnet", "preresnet18"), IMAGE),
    "pytorchcv densenet121": ("DenseNet", _cv("densenet", "densenet121"), IMAGE),
    "pytorchcv mobilenet_w1": ("depthwise", _cv("mobilenet", "mobilenet_w1"), IMAGE),
    "pytorchcv mobilenetv2_w1": ("depthwise", _cv("mobilenetv2", "mobilenetv2_w1"), IMAGE),
    "pytorchcv shufflenetv2_w1": ("channel shuffle", _cv("shufflenetv2", "shufflenetv2_w1"), IMAGE),
    "pytorchcv efficientnet_b0": ("squeeze-excite", _cv("efficientnet", "efficientnet_b0"), IMAGE),
    "pytorchcv inceptionv4": ("branches", _cv("inceptionv4", "inceptionv4"), (1, 3, 299, 299)),
    "pytorchcv dla34": ("aggregation", _cv("dla", "dla34"), IMAGE),
    "pytorchcv dpn68": ("dual path, pre-activation", _cv("dpn", "dpn68"), IMAGE),
    "pytorchcv hrnet_w18_small_v1": ("multi-resolution", _cv("hrnet", "hrnet_w18_small_v1"), IMAGE),
    "pytorchcv regnetx002": ("grouped", _cv("regnet", "regnetx002"), IMAGE),
    "pytorchcv ghostnet": ("cheap features", _cv("ghostnet", "ghostnet"), IMAGE),
    "pytorchcv irevnet301": ("invertible, pre-activation", _cv("irevnet", "irevnet301"), (1, 3, 224, 224)),
    "pytorchcv darknet53": ("leaky ReLU", _cv("darknet53", "darknet53"), (2, 3, 224, 224)),
    "pytorchcv unet_cityscapes": ("UNet", _cv("unet", "unet_cityscapes", **_CITY), SMALL),
    "pytorchcv linknet_cityscapes": ("ConvTranspose2d", _cv("linknet", "linknet_cityscapes", **_CITY), SMALL),
    "pytorchcv erfnet_cityscapes": ("ConvTranspose2d", _cv("erfnet", "erfnet_cityscapes", **_CITY), SMALL),
    "pytorchcv enet_cityscapes": ("unpooling", _cv("enet", "enet_cityscapes", **_CITY), SMALL),
    "monai UNet 1-D": (
        "1-D UNet, ConvTranspose1d",
        _monai("UNet", norm="batch", **{**_UNET, "spatial_dims": 1}),
        (2, 1, 64),
    ),
    "monai DenseNet121": (
        "3-D DenseNet",
        _monai("DenseNet121", spatial_dims=3, in_channels=1, out_channels=2),
        (2, 1, 64, 64, 64),
    ),
    "monai UNet": (
        "3-D UNet, ConvTranspose3d",
        _monai("UNet", norm="batch", num_res_units=2, **_UNET),
        VOLUME,
    ),
    "monai VNet": ("3-D, ConvTranspose3d", _monai("VNet"), VOLUME),
    "monai HighResNet": ("3-D pre-activation", _monai("HighResNet", norm_type="batch"), (2, 1, 16, 16, 16)),
    "monai AttentionUnet": ("3-D attention", _monai("AttentionUnet", **_UNET), VOLUME),
    "efficientnet-pytorch b0": ("Conv2d subclass", _efficientnet, IMAGE),
    "transformers LeViT": ("Linear + BatchNorm1d", _transformer("Levit"), IMAGE),
    "transformers MobileViT": ("convolution and attention", _transformer("MobileViT"), (1, 3, 256, 256)),
    "transformers RegNet": ("grouped, squeeze-excite", _transformer("RegNet"), SMALL),
    "transformers SwiftFormer": ("additive attention", _transformer("SwiftFormer"), IMAGE),
    "dcgan-pytorch Generator": (
        "GAN generator, ConvTranspose2d",
        _dcgan("Generator", "g-cifar"),
        (2, 100, 1, 1),
    ),
    "dcgan-pytorch Discriminator": ("GAN discriminator", _dcgan("Discriminator", "d-cifar"), SMALL),
}


@dataclass(frozen=True)
class Row:
    """One architecture: batch norms that run, how many each folds, relative errors, seconds of folding.

    ``error``: of the folds in float64. ``native_error`` and ``original_error``: of the folded model and the
    original in float32, against the original in float64. ``difference``: of the folded model in float32 from
    the original in float32. ``sensitivity``: see ``last_bit``. ``guarded``: folded at the calls that lead to
    them, as no path is certain. ``packed``: layers of the folded model that
    serve from packed weights.
    """

    name: str
    kind: str
    norms: int
    folded: int
    guarded: int
    taken_back: int
    fx_folded: int | None
    error: float
    native_error: float
    original_error: float
    difference: float
    sensitivity: float
    packed: int
    evidence: str
    seconds: float


def prepare(model: nn.Module, shape: Shape) -> tuple[nn.Module, torch.Tensor]:
    """Draw γ and β, and take running statistics from two training-mode passes.

    Of 16 pictures, or 4 volumes: from two alone, the variance of some channel may be next to nothing.
    """
    batch = 16 if len(shape) == 4 else 4
    generator = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        if norm.affine:
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.normal_(0.0, 0.2, generator=generator)
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(batch, *shape[1:], generator=generator))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval(), torch.randn(shape, generator=generator)


def last_bit(model: nn.Module, example: torch.Tensor) -> float:
    """How far the output moves, all in float64, when the input moves by half a unit in float32's last place.

    No arithmetic in float32 can be expected to be nearer to the truth than that.
    """
    twin = copy.deepcopy(model).double()
    exact = example.double()
    signs = torch.where(torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    moved = exact * (1 + signs.double() * 2.0**-24)
    return distance(run(twin, ((moved,), {})), run(twin, ((exact,), {})))


def rounding(name: str, inputs: int) -> dict[str, float]:
    """Where the distance from the truth in float64 comes from: medians over random inputs.

    "weights alone": the folded weights rounded to float32, all arithmetic in float64.
    """
    _, build, shape = ARCHITECTURES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's code
        model, example = prepare(build(), shape)
        plain, packed = gb.fold(model, example, pack=False), gb.fold(model, example)
    truth, rounded = copy.deepcopy(model).double(), copy.deepcopy(plain).double()
    found: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(1)
    for _ in range(inputs):
        x = torch.randn(shape, generator=generator)
        wanted = run(truth, ((x.double(),), {}))
        for label, program in {"original": model, "folded": plain, "packed": packed}.items():
            found.setdefault(label, []).append(distance(run(program, ((x,), {})), wanted))
        alone = distance(run(rounded, ((x.double(),), {})), wanted)
        found.setdefault("weights alone", []).append(alone)
        found.setdefault("last bit of the input", []).append(last_bit(model, x))
    return {label: statistics.median(distances) for label, distances in found.items()}


def fx_folded(model: nn.Module) -> int | None:
    """Count the batch norms torch.fx's fuser removes; None if it does not trace the model."""
    from torch.fx.experimental import optimization  # warns at import

    try:
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
        fused = optimization.fuse(copy.deepcopy(model), inplace=True)
    except Exception:  # whatever the model's code raises on symbols
        return None
    return _norm_calls(traced) - _norm_calls(fused)


def _norm_calls(graph: Any) -> int:
    named = dict(graph.named_modules())
    nodes = graph.graph.nodes
    return sum(n.op == "call_module" and isinstance(named[n.target], _BatchNorm) for n in nodes)


def measure(name: str) -> Row:
    """Fold one architecture and count."""
    kind, build, shape = ARCHITECTURES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's code
        model, example = prepare(build(), shape)
        began = time.perf_counter()
        folded = gb.fold(model, example)
        seconds = time.perf_counter() - began
        report = folded.fold_report
        inputs: Inputs = ((example,), {})
        difference = distance(run(folded, inputs), run(model, inputs))
        sensitivity = last_bit(model, example)
        theirs = fx_folded(model)
    return Row(
        name=name,
        kind=kind,
        norms=len(report.layers),
        folded=len(report.folded),
        guarded=len(report.guarded),
        taken_back=sum(layer.outcome == "taken back" for layer in report.layers),
        fx_folded=theirs,
        error=max(report.error, report.random_error),
        native_error=report.native_error,
        original_error=report.original_error,
        difference=difference,
        sensitivity=sensitivity,
        packed=len(report.packed),
        evidence=report.evidence,
        seconds=seconds,
    )


def _fewer(row: Row) -> bool:
    return row.folded + row.guarded < (row.fx_folded or 0)


def page(rows: list[Row]) -> str:
    """Render as Markdown."""
    return table(
        [
            {
                "architecture": row.name,
                "stands for": row.kind,
                "batch norms": row.norms,
                "folded": row.folded,
                "guarded": row.guarded,
                "torch.fx folds": "does not trace" if row.fx_folded is None else row.fx_folded,
                "fold error (float64)": f"{row.error:.0e}",
                "float32, folded": f"{row.native_error:.1e}",
                "float32, original": f"{row.original_error:.1e}",
                "float32, folded from original": f"{row.difference:.1e}",
                "last bit of the input": f"{row.sensitivity:.1e}",
                "packed": row.packed,
                "flow from": row.evidence,
            }
            for row in rows
        ]
    )


def main() -> int:
    """Measure what is asked for, or everything; exit 1 if any is wrong or folds fewer than torch.fx."""
    parser = argparse.ArgumentParser(description="fold public architectures")
    parser.add_argument("names", nargs="*", help="architectures (default: all installed)")
    parser.add_argument("--docs", type=Path, help="document whose table to replace")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounding", type=int, metavar="INPUTS", help="say where the rounding comes from")
    options = parser.parse_args()
    if options.rounding:
        for name in options.names or ARCHITECTURES:
            medians = rounding(name, options.rounding)
            print(f"{name}: " + ", ".join(f"{label} {value:.1e}" for label, value in medians.items()))
        return 0
    rows = []
    for name in options.names or ARCHITECTURES:
        try:
            row = measure(name)
        except ImportError as error:
            print(f"{name}: skipped ({error})", file=sys.stderr)
            continue
        rows.append(row)
        print(
            f"{row.name}: {row.folded} of {row.norms}, {row.guarded} guarded (torch.fx: {row.fx_folded}), "
            f"{row.error:.1e}, "
            f"native {row.native_error:.1e} / {row.original_error:.1e}, apart {row.difference:.1e}, "
            f"last bit {row.sensitivity:.1e}, "
            f"{row.packed} packed, {row.seconds:.1f} s",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    if options.docs:
        opening, closing = "<!-- architectures: begin -->", "<!-- architectures: end -->"
        write_between(options.docs, opening, closing, page(rows).rstrip("\n"))
    bad = [row.name for row in rows if row.error > 1e-5 or _fewer(row)]
    print("wrong, or fewer than torch.fx:", ", ".join(bad) if bad else "none")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
