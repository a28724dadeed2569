"""Healthy models of images, sound and volumes: segmentation, generation, fine-tuning, detection."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gammabeta as gb

from .cases import CLASSES, Given, Shuffled, alone, classified, classifier, own, train


def block(given: int, made: int, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    conv = nn.Conv2d(given, made, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(made), nn.ReLU())


def network(colours: int = 1) -> nn.Sequential:
    """Three blocks, a mean over positions, a head."""
    blocks = block(colours, 8), block(8, 16, 2), block(16, 16, 2)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def images(samples: int = 512, size: int = 12, colours: int = 1) -> tuple[Tensor, Tensor]:
    """Smooth pictures (N, colours, size, size) of some classes."""
    x, y = classified(colours, size // 3, size // 3, samples=samples)
    return F.interpolate(x, size, mode="bilinear") + 0.1 * torch.randn(samples, colours, size, size), y


@own("channels_last")
def _() -> Given:
    x, y = images()
    loader = Shuffled(x.contiguous(memory_format=torch.channels_last), y)
    return classifier(network().to(memory_format=torch.channels_last), loader)  # type: ignore[call-overload]


@own("our fused layers")
def _() -> Given:
    return classifier(gb.convert(network()), Shuffled(*images()))


class NormEval(nn.Module):
    """A backbone whose train() leaves its norms in evaluation, with a head of its own."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Sequential(block(16, 16), nn.AdaptiveAvgPool2d(1))
        self.last = nn.Linear(16, CLASSES)

    def train(self, mode: bool = True) -> "NormEval":
        """As mmdetection's ``norm_eval``."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.last(self.head(self.backbone(x)).flatten(1))
        return out


def backbone() -> nn.Sequential:
    """The blocks of a network that was trained on other pictures."""
    model = network()
    x, y = images()
    train(model, Shuffled(x * 1.3 + 0.2, y))
    return model[:3]


@own("norm_eval, a train() of its own")
def _() -> Given:
    return classifier(NormEval(backbone()), Shuffled(*images()))


@own("norm_eval, diagnosed in training mode")
def _() -> Given:
    given = classifier(NormEval(backbone()), Shuffled(*images()))
    given.model.train()
    return given


@own("frozen backbone, new head")
def _() -> Given:
    model = nn.Sequential(
        backbone().requires_grad_(False), block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.append(nn.Linear(16, CLASSES))
    loader = Shuffled(*images())

    def objective(model: Any, batch: Any) -> Tensor:
        model[0].eval()
        return F.cross_entropy(model(batch[0]), batch[1])

    return Given(train(model, loader, objective), loader, {"loss": F.cross_entropy})


@own("frozen layers by class")
def _() -> Given:
    model = nn.Sequential(gb.convert(backbone(), to="frozen"), *network()[3:])
    return classifier(model, Shuffled(*images()))


class Auxiliary(nn.Module):
    """A second head in training alone, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = block(1, 8), nn.Sequential(block(8, 16, 2), block(16, 16, 2))
        self.side = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.near, self.far = nn.Linear(8, CLASSES), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Any:
        """Logits; in training those of both heads."""
        x = self.low(x)
        far = self.far(self.high(x).mean((2, 3)))
        return (far, self.near(self.side(x).mean((2, 3)))) if self.training else far


def of_both(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of all that is there."""
    if isinstance(output, tuple):
        return F.cross_entropy(output[0], labels) + 0.3 * F.cross_entropy(output[1], labels)
    return F.cross_entropy(output, labels)


@own("auxiliary head")
def _() -> Given:
    loader = Shuffled(*images())
    model = train(Auxiliary(), loader, lambda m, b: of_both(m(b[0]), b[1]))
    return Given(model, loader, {"loss": of_both})


class UNet(nn.Module):
    """Down, up, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.deep = block(1, 8), block(8, 16, 2), block(16, 16, 2)
        self.up, self.join = nn.ConvTranspose2d(16, 16, 2, 2), block(32, 8)
        self.last_up, self.leave = nn.ConvTranspose2d(8, 8, 2, 2), block(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 2, H, W)."""
        first = self.enter(x)
        second = self.down(first)
        third = self.join(torch.cat([self.up(self.deep(second)), second], 1))
        out: Tensor = self.head(self.leave(torch.cat([self.last_up(third), first], 1)))
        return out


def blobs(samples: int, size: int) -> tuple[Tensor, Tensor]:
    """Pictures with bright places, and where these are; -100 where nobody says."""
    field = F.interpolate(torch.randn(samples, 1, size // 4, size // 4), size, mode="bilinear")
    where = (field[:, 0] > 0.3).long()
    where[torch.rand(where.shape) < 0.1] = -100
    return field + 0.3 * torch.randn_like(field), where


@own("U-Net, segmentation")
def _() -> Given:
    return classifier(UNet(), Shuffled(*blobs(256, 16), size=16))


@own("batches of two large maps")
def _() -> Given:
    loader = Shuffled(*blobs(48, 96), size=2)
    return Given(train(UNet(), loader, passes=3), loader, {"loss": F.cross_entropy})


class Pyramid(nn.Module):
    """Dilated convolutions beside a normalised mean over the whole picture, as DeepLab's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(1, 8)
        self.near = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU())
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (N, 2, H, W), in a dict."""
        x = self.stem(x)
        whole = self.whole(x).expand(-1, -1, *x.shape[2:])
        return {"out": self.head(torch.cat([self.near(x), whole], 1))}


@own("segmentation, one value a picture")
def _() -> Given:
    loader = Shuffled(*blobs(256, 16))

    def loss(output: Any, where: Tensor) -> Tensor:
        return F.cross_entropy(output["out"], where)

    model = train(Pyramid(), loader, lambda m, b: loss(m(b[0]), b[1]), passes=16)
    return Given(model, loader, {"loss": loss})


class Dense(nn.Module):
    """Growing concatenations, recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 8, 3, padding=1)) for n in (8, 16, 24)
        )
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, checkpoint(layer, x, use_reentrant=False)], 1)
        out: Tensor = self.head(F.relu(self.norm(x)).mean((2, 3)))
        return out


@own("dense blocks under checkpointing, our layers")
def _() -> Given:
    return classifier(gb.convert(Dense()), Shuffled(*images()))


class Detector(nn.Module):
    """A list of pictures of different sizes to one row each."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(block(3, 8), block(8, 16, 2)), nn.Linear(16, CLASSES)

    def forward(self, pictures: list[Tensor]) -> Tensor:
        """Logits."""
        size = max(picture.shape[-1] for picture in pictures)
        padded = [F.pad(p, (0, size - p.shape[2], 0, size - p.shape[1])) for p in pictures]
        out: Tensor = self.head(self.body(torch.stack(padded)).mean((2, 3)))
        return out


@own("lists of pictures")
def _() -> Given:
    x, y = images(colours=3)
    cut = [picture[:, :n, :n] for picture, n in zip(x, torch.randint(9, 13, (len(x),)).tolist(), strict=True)]
    loader = Shuffled(cut, y, size=33)
    return classifier(Detector(), loader)


@own("samples as dicts")
def _() -> Given:
    x, y = images(colours=3)
    samples = [{"image": picture, "label": int(label)} for picture, label in zip(x, y, strict=True)]
    loader = Shuffled(samples, form=alone)

    def forward(model: Any, batch: Any) -> Any:
        return model([sample["image"] for sample in batch])

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, torch.tensor([sample["label"] for sample in batch]))

    model = train(Detector(), loader, lambda m, b: loss(forward(m, b), b))
    return Given(model, loader, {"loss": loss, "forward_fn": forward})


def _adversaries() -> tuple[nn.Module, nn.Module, Tensor]:
    """A generator and a spectrally normalised discriminator, trained in turns."""
    made = nn.Sequential(
        nn.Linear(8, 16 * 9, bias=False),
        nn.Unflatten(1, (16, 3, 3)),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
    )
    judge = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(1, 8, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        parametrizations.spectral_norm(nn.Conv2d(8, 16, 3, 2, 1)),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(144, 1),
    )
    real, _ = images()
    loss = F.binary_cross_entropy_with_logits

    def step(batch: Tensor) -> Tensor:
        noise = made(torch.randn(len(batch), 8))
        mixed = judge(torch.cat([batch, noise.detach()]))
        truth = torch.cat([torch.ones(len(batch), 1), torch.zeros(len(batch), 1)])
        judge.eval().requires_grad_(False)
        fooled = loss(judge(noise), torch.ones(len(batch), 1))
        judge.train().requires_grad_(True)
        return loss(mixed, truth) + fooled

    both = nn.ModuleList([made, judge])
    train(both, Shuffled(real, form=alone), lambda _, batch: step(batch), passes=12)
    with torch.no_grad():
        return made, judge, torch.cat([real[:256], made(torch.randn(256, 8))])


@own("generator")
def _() -> Given:
    made, _, _ = _adversaries()
    return Given(made, [torch.randn(64, 8) for _ in range(8)])


@own("discriminator, spectral norm")
def _() -> Given:
    _, judge, mixed = _adversaries()
    truth = torch.cat([torch.ones(256, 1), torch.zeros(256, 1)])
    return Given(judge, Shuffled(mixed, truth, size=64), {"loss": F.binary_cross_entropy_with_logits})


class Gated(nn.Module):
    """Squeeze and excite with a norm inside, on one value a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(block(1, 8), block(8, 16, 2)), block(16, 16)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(16, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 16, 1),
            nn.Sigmoid(),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.body(x)
        out: Tensor = self.head(self.out(x * self.gate(x)).mean((2, 3)))
        return out


@own("squeeze and excite")
def _() -> Given:
    return classifier(Gated(), Shuffled(*images()))


class Residual(nn.Module):
    """Each branch begins at zero: the last γ is 0 at the start, and learns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branches = block(1, 8), nn.ModuleList()
        for _ in range(3):
            branch = nn.Sequential(*block(8, 8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
            nn.init.zeros_(branch[-1].weight)  # type: ignore[arg-type]
            self.branches.append(branch)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        for branch in self.branches:
            x = F.relu(x + branch(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@own("residual branches from zero")
def _() -> Given:
    return classifier(Residual(), Shuffled(*images()))


@own("tiny scale behind each block")
def _() -> Given:
    class Scaled(Residual):
        def __init__(self) -> None:
            super().__init__()
            for branch in self.branches:
                nn.init.ones_(branch[-1].weight)
            self.scales = nn.Parameter(torch.full((3, 8), 1e-5))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for branch, scale, norm in zip(self.branches, self.scales, self.norms, strict=True):
                x = x + norm(scale[:, None, None] * branch(x))
            out: Tensor = self.head(x.mean((2, 3)))
            return out

    return classifier(Scaled(), Shuffled(*images()))


@own("volumes")
def _() -> Given:
    x, y = classified(1, 6, 6, 6, samples=256)
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, bias=False),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, bias=False),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    return classifier(model, Shuffled(x, y))


@own("sound")
def _() -> Given:
    x, y = classified(1, 64)
    model = nn.Sequential(
        nn.Conv1d(1, 8, 9, 2), nn.BatchNorm1d(8), nn.SiLU(), nn.Conv1d(8, 16, 5, 2), nn.BatchNorm1d(16)
    )
    model.extend([nn.SiLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES)])
    return classifier(model, Shuffled(x, y))


@own("lazy layers, instance norm beside batch norm")
def _() -> Given:
    model = nn.Sequential(
        nn.LazyConv2d(8, 3),
        nn.InstanceNorm2d(8),
        nn.LazyConv2d(16, 3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )
    x, y = images()
    with torch.no_grad():
        model.eval()(x[:2])
    return classifier(model, Shuffled(x, y))


@own("autoencoder of pictures, no loss")
def _() -> Given:
    loader = Shuffled(images()[0], form=alone)
    model = nn.Sequential(block(1, 8, 2), block(8, 4, 2), nn.ConvTranspose2d(4, 8, 2, 2), nn.BatchNorm2d(8))
    model.extend([nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2)])
    return Given(train(model, loader, lambda m, x: F.mse_loss(m(x), x)), loader)


@own("teacher of averaged weights beside the student")
def _() -> Given:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = network()
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                goal = self.teacher(x)
            return self.student(x), goal

        @torch.no_grad()
        def follow(self) -> None:
            for mine, its in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(its, 0.1)

    loader = Shuffled(*images())

    def loss(output: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(output[0], labels) + 0.1 * F.mse_loss(*output)

    def objective(model: Any, batch: Any) -> Tensor:
        model.follow()
        return loss(model(batch[0]), batch[1])

    return Given(train(Both(), loader, objective, passes=16), loader, {"loss": loss})


@own("autocast inside the model, no loss")
def _() -> Given:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.net(x)
            return out.float()

    loader = Shuffled(*images())
    return Given(train(Half(), loader), loader)


@own("a deep network in small batches, no loss")
def _() -> Given:
    model = nn.Sequential(block(1, 8), *[block(8, 8) for _ in range(12)], nn.AdaptiveAvgPool2d(1))
    model.append(nn.Flatten()).append(nn.Linear(8, CLASSES))
    loader = Shuffled(*images(256), size=8)
    return Given(train(model, loader, passes=6), loader)
