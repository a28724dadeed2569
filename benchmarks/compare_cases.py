"""What ``compare.py`` times: run in a process of its own, with the package of one of two checkouts.

``python benchmarks/compare_cases.py SUITE ROUNDS`` prints one line of JSON: the checkout, and for every case
the median seconds of a call and a sum over each tensor that the first call returned. With 0 rounds it only
warms up: kernels are then compiled and cached. The cases use public names only, since both checkouts run
them; shapes are ``(N, C, *spatial)``.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import gammabeta as gb
from benchmarks.harness.timing import interleave
from gammabeta.functional import MaxPool, batch_norm

Case = Callable[[], Sequence[Tensor]]

BF16 = {"dtype": torch.bfloat16}
RELU = {"activation": "relu"}
SERVED = RELU | {"training": False}
LAYERS = {
    "BN": [((16, 64, 28, 28), {}), ((8, 256, 28, 28), {}), ((16, 64, 28, 28), BF16)],
    "BN+ReLU": [((16, 64, 56, 56), RELU), ((16, 256, 14, 14), RELU), ((16, 64, 56, 56), RELU | BF16)],
    "BN+SiLU": [((16, 64, 28, 28), {"activation": "silu"})],
    "BN+add+ReLU": [((16, 128, 28, 28), RELU), ((16, 512, 7, 7), RELU)],
    "BN+ReLU+mean pool": [((64, 20, 26, 26), RELU | {"pool": 2})],
    "BN+ReLU+max pool": [((8, 64, 56, 56), RELU | {"pool": MaxPool(3, 2, 1)})],
    "BN+ReLU, evaluation": [
        ((16, 64, 56, 56), SERVED),
        ((16, 64, 28, 28), SERVED | BF16),
    ],
}
PERCEPTRONS = {"BN+ReLU": [((1024, 1024), RELU), ((128, 512), RELU)]}


def layer(shape: tuple[int, ...], form: torch.memory_format, options: dict[str, object], added: bool) -> Case:
    """Forward and backward of ``functional.batch_norm``; in evaluation the forward alone."""
    options = dict(options)
    dtype, training = options.pop("dtype", torch.float32), options.pop("training", True)

    def draw(like: Sequence[int]) -> Tensor:
        return torch.randn(like).to(dtype, memory_format=form)

    x, residual = draw(shape).requires_grad_(), draw(shape).requires_grad_() if added else None
    weight, bias = (torch.rand(shape[1]).add_(0.5).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])

    def forward() -> Tensor:
        return batch_norm(x, mean, var, weight, bias, training, residual=residual, **options)

    def evaluate() -> Sequence[Tensor]:
        with torch.inference_mode():
            return [forward()]

    if not training:
        return evaluate
    upstream = draw(forward().shape)
    leaves = [leaf for leaf in (x, weight, bias, residual) if leaf is not None]

    def step() -> Sequence[Tensor]:
        out = forward()
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    return step


def kernels() -> dict[str, Case]:
    """Single layers in both memory layouts."""
    cases = {}
    layouts = [(LAYERS, torch.contiguous_format), (LAYERS, torch.channels_last)]
    for table, form in [*layouts, (PERCEPTRONS, torch.contiguous_format)]:
        for operation, layers in table.items():
            for shape, options in layers:
                kind = "channels_last" if form is torch.channels_last else "contiguous"
                kind += ", bf16" if "dtype" in options else ""
                title = f"{operation}, {'×'.join(map(str, shape))}, {kind}"
                cases[title] = layer(shape, form, options, "add" in operation)
    return cases


def small() -> dict[str, Case]:
    """Modules on inputs so small that the time is the host's, not the kernel's."""
    cases = {}
    for kind, shape in ((gb.nn.BatchNorm1d, (64, 128)), (gb.nn.BatchNorm2d, (8, 16, 8, 8))):
        for activation in (None, "relu"):
            title = f"{kind.__name__}{'+ReLU' if activation else ''}, {'×'.join(map(str, shape))}"
            trained, served = (kind(shape[1], activation=activation) for _ in range(2))
            cases[f"{title}, training"] = module_step(trained, torch.randn(shape).requires_grad_())
            cases[f"{title}, evaluation"] = served_by(served, torch.randn(shape))
    return cases


def module_step(module: nn.Module, x: Tensor) -> Case:
    """Forward and backward of a module in training mode."""
    upstream, leaves = torch.randn(x.shape), [x, *module.parameters()]

    def step() -> Sequence[Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    return step


def served_by(module: nn.Module, x: Tensor) -> Case:
    """The forward of a module in evaluation mode."""
    module.eval()

    def forward() -> Sequence[Tensor]:
        with torch.inference_mode():
            return [module(x)]

    return forward


def conv_bn(inside: int, outside: int, side: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size, and its batch norm."""
    conv = nn.Conv2d(inside, outside, side, stride, side // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outside)]


class Add(nn.Module):
    """``activation(body(x) + shortcut(x))``: a residual block as in ResNet, or linear as in MobileNetV2."""

    def __init__(self, body: list[nn.Module], shortcut: list[nn.Module], activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = nn.Sequential(*body), nn.Sequential(*shortcut), activation

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        return self.activation(self.body(x) + self.shortcut(x))


class Dense(nn.Module):
    """A DenseNet layer: its input, and beside it what BN, ReLU and convolution make of it, twice."""

    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        first = [nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, 4 * growth, 1, bias=False)]
        second = [nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)]
        self.body = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C + growth, H, W)``."""
        return torch.cat([x, self.body(x)], 1)


def network(body: list[nn.Module], width: int) -> nn.Module:
    """Blocks with their head."""
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def resnet() -> nn.Module:
    """ResNet-18's stem and stages."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks.append(nn.MaxPool2d(3, 2, 1))
    for inside, width, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        for first, step in ((inside, stride), (width, 1)):
            body = [*conv_bn(first, width, stride=step), nn.ReLU(), *conv_bn(width, width)]
            shortcut = conv_bn(first, width, 1, step) if first != width else []
            blocks.append(Add(body, shortcut, nn.ReLU()))
    return network(blocks, 512)


def mobilenet() -> nn.Module:
    """Inverted residuals with ReLU6, as in MobileNetV2, fewer of them."""
    blocks: list[nn.Module] = [*conv_bn(3, 32, stride=2), nn.ReLU6()]
    for inside, outside, stride in (
        (32, 24, 1),
        (24, 24, 1),
        (24, 32, 2),
        (32, 32, 1),
        (32, 96, 2),
        (96, 96, 1),
    ):
        wide = 6 * inside
        body = [*conv_bn(inside, wide, 1), nn.ReLU6(), *conv_bn(wide, wide, 3, stride, wide), nn.ReLU6()]
        body += conv_bn(wide, outside, 1)
        blocks.append(Add(body, [], nn.Identity()) if inside == outside else nn.Sequential(*body))
    return network(blocks, 96)


def densenet() -> nn.Module:
    """Two dense blocks of four layers."""
    blocks: list[nn.Module] = [*conv_bn(3, 64, 3, 2), nn.ReLU()]
    for inside in (64, 96):
        blocks += [Dense(inside + 32 * i, 32) for i in range(4)]
        blocks += [nn.BatchNorm2d(inside + 128), nn.ReLU(), nn.Conv2d(inside + 128, 96, 1, bias=False)]
        blocks.append(nn.AvgPool2d(2))
    return network(blocks, 96)


def models() -> dict[str, Case]:
    """A training step of converted networks: forward, loss, backward, SGD."""
    cases = {}
    for name, build in (("ResNet-18", resnet), ("MobileNetV2", mobilenet), ("DenseNet", densenet)):
        torch.manual_seed(0)
        model = gb.convert(build().train(), to="fused")
        cases[f"{name}-like, 8×3×96×96, training step"] = training_step(model, torch.randn(8, 3, 96, 96))
    return cases


def training_step(model: nn.Module, x: Tensor) -> Case:
    """One step on the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.arange(len(x)) % 10

    def step() -> Sequence[Tensor]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return step


def inference() -> dict[str, Case]:
    """Folded networks: the digit network, and a residual one that folding packs."""
    digits, example = gb.train.DigitNetwork().train(), torch.randn(64, 1, 28, 28)
    large, image = resnet().train(), torch.randn(1, 3, 96, 96)
    with torch.no_grad():  # running statistics that are not 0 and 1
        digits(example), large(torch.randn(8, 3, 96, 96))
    digits, large = gb.fold(digits.eval(), example), gb.fold(large.eval(), image)
    return {
        "digit network, folded, batch 1": served_by(digits, torch.randn(1, 1, 28, 28)),
        "digit network, folded, batch 256": served_by(digits, torch.randn(256, 1, 28, 28)),
        "ResNet-18-like, folded and packed, 1×3×96×96": served_by(large, image),
    }


SUITES = {"kernels": kernels, "small": small, "models": models, "inference": inference}


def main(suite: str, rounds: int) -> None:
    """Build a suite's cases, run each once, time them in rounds; print JSON."""
    torch.manual_seed(0)
    cases = SUITES[suite]()
    sums = {title: [float(t.detach().double().abs().sum()) for t in case()] for title, case in cases.items()}
    for case in cases.values() if rounds else ():
        case()
    times = interleave(cases, rounds=rounds) if rounds else {}
    seconds = {title: timing.median for title, timing in times.items()}
    checkout = str(Path(gb.__file__).resolve().parents[2])
    print(json.dumps({"checkout": checkout, "seconds": seconds, "sums": sums}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
