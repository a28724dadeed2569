"""Healthy models of many kinds: no error, no warning. Beside some their sick twins, which are found."""

import contextlib
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb

SIZE, BATCHES = 32, 4

# recalibrate says which norms it leaves; here the doctor is asked.
pytestmark = pytest.mark.filterwarnings("ignore::gammabeta.stats.recalibrate.NotCalibrated")


def data(*shape: int, size: int = SIZE, number: int = BATCHES):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, *shape, generator=generator) for _ in range(number)]


def trained_like(model: nn.Module, loader, **options) -> nn.Module:
    """Exact statistics, with counts as of a long training."""
    with contextlib.suppress(gb.errors.SurgeryError):
        gb.recalibrate(model, loader, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked += 500 * (module.num_batches_tracked > 0)
    return model.eval()


def assert_healthy(model, loader, **options):
    report = gb.diagnose(model, loader, **options)
    assert report.at_least("warning") == [], str(report)
    return report


class Encoder(nn.Module):
    """A stem that the models below share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def features(self, x):
        return F.relu(self.norm(self.stem(x)))

    def forward(self, x):
        return self.head(self.features(x))


# --- noise in evaluation ----------------------------------------------------------------------------------


class Vae(Encoder):
    def forward(self, x):
        mean, log = self.head(self.features(x)).chunk(2, 1)
        return mean + torch.randn_like(mean) * log.exp()


class McDropout(Encoder):
    def forward(self, x):
        return self.head(F.dropout(self.features(x), 0.5, training=True))


class McDropoutBeforeNorm(Encoder):
    def forward(self, x):
        return self.head(F.relu(self.norm(F.dropout(self.stem(x), 0.5, training=True))))


class DropPathLeftOn(Encoder):
    def forward(self, x):
        kept = (torch.rand(len(x), 1) < 0.7).float() / 0.7
        return self.head(self.features(x) * kept)


class Augmented(Encoder):
    """NumPy's and Python's numbers, and as many views as chance says."""

    def forward(self, x):
        views = [x + torch.from_numpy(np.random.randn(*x.shape)).float() * 0.1 for _ in range(3)]  # noqa: NPY002
        return torch.stack([super(Augmented, self).forward(v) for v in views]).mean(0) * random.choice([1, 2])


class OwnGenerator(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.torch, self.numpy = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def forward(self, x):
        noise = torch.randn(len(x), 4, generator=self.torch) + float(self.numpy.normal())
        return super().forward(x) + noise


class Rejection(Encoder):
    """How many numbers are drawn depends on the data."""

    def forward(self, x):
        return torch._standard_gamma(F.softplus(super().forward(x)) + 0.1)


NOISY = [Vae, McDropout, McDropoutBeforeNorm, DropPathLeftOn, Augmented, OwnGenerator, Rejection]


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("loss", [None, lambda out, _: float(out.square().mean())], ids=["output", "loss"])
def test_noise_in_evaluation_is_not_the_batch(kind, loss):
    torch.manual_seed(0)
    loader = data(6)
    report = assert_healthy(trained_like(kind(), loader), loader, loss=loss)
    assert report.evidence.not_examined == []


@pytest.mark.parametrize("kind", [Vae, McDropout, OwnGenerator])
def test_the_batch_is_found_under_noise(kind):
    torch.manual_seed(0)
    loader = data(6)
    model = trained_like(kind(), loader)
    model.norm = nn.BatchNorm1d(8, track_running_stats=False)
    assert "batch-dependence" in {f.check for f in gb.diagnose(model, loader).at_least("warning")}


def test_generators_of_the_model_go_on_where_they_were():
    model = trained_like(OwnGenerator(), data(6))
    before = model.torch.get_state(), model.numpy.bit_generator.state
    gb.diagnose(model, data(6))
    assert torch.equal(before[0], model.torch.get_state())
    assert before[1] == model.numpy.bit_generator.state


def test_dropout_before_a_norm_that_was_recalibrated():
    torch.manual_seed(0)
    loader = data(6, size=128)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.BatchNorm1d(8))
    model[3].momentum = None
    for x in loader:
        model.train()(x)
    model[3].momentum = 0.1
    stale = gb.diagnose(model.eval(), loader).at_least("warning")
    assert ("dropout-before-bn", "3") in {(f.check, f.layer) for f in stale}
    assert_healthy(trained_like(model, loader), loader)


# --- layers that are not called, or not alike ---------------------------------------------------------------


class Unused(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.BatchNorm1d(8)


class ReadsBuffers(Encoder):
    """Not called, but used."""

    def features(self, x):
        n = self.norm
        return F.relu(F.batch_norm(self.stem(x), n.running_mean, n.running_var, n.weight, n.bias, False))


def test_an_unused_layer_is_a_note():
    model = trained_like(Unused(), data(6))
    for report in (assert_healthy(model, data(6)), gb.diagnose(model, example=data(6)[0])):
        assert [(f.layer, f.severity) for f in report if f.check == "never-updated"] == [("spare", "note")]
    assert [f.layer for f in gb.diagnose(model) if f.severity == "error"] == ["spare"]  # nothing was run


def test_a_layer_whose_buffers_are_read_is_used():
    found = gb.diagnose(ReadsBuffers().eval(), data(6))
    assert ("never-updated", "error") in {(f.check, f.severity) for f in found}


class Ghost(nn.Module):
    """As TabNet's: each part of a batch is normalised by itself."""

    def __init__(self, part: int) -> None:
        super().__init__()
        self.part, self.norm = part, nn.BatchNorm1d(8)

    def forward(self, x):
        return torch.cat([self.norm(piece) for piece in x.split(self.part)])


class TabNetLike(nn.Module):
    def __init__(self, part: int = 32) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"first": nn.BatchNorm1d(6), "fc": nn.Linear(6, 8), "ghost": Ghost(part)})

    def forward(self, x):
        return self.net["ghost"](self.net["fc"](self.net["first"](x)))


class LayerDrop(nn.Module):
    """Blocks that training skips at random."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {"stem": nn.BatchNorm1d(6), "block": nn.BatchNorm1d(6), "end": nn.Linear(6, 2)}
        )

    def forward(self, x):
        x = self.net["stem"](x)
        if not self.training or random.random() < 0.5:
            x = x + self.net["block"](x)
        return self.net["end"](x)


@pytest.mark.parametrize(
    ("model", "often", "seldom"),
    [(TabNetLike(), "net.ghost.norm", "net.first"), (LayerDrop(), "net.stem", "net.block")],
    ids=["tabnet", "layerdrop"],
)
def test_updates_that_are_unequal_by_design(model, often, seldom):
    loader = data(6, size=128, number=6)
    trained_like(model, loader)
    model.get_submodule(often).num_batches_tracked.fill_(2000)
    model.get_submodule(seldom).num_batches_tracked.fill_(500)
    assert_healthy(model, loader)


class TwoHeads(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))

    def forward(self, x, head: int = 0):
        return self.heads[head](self.features(x))


def test_a_head_that_no_data_reaches():
    loader = data(6)
    assert_healthy(trained_like(TwoHeads(), loader), loader)


class NormEval(Encoder):
    """Fine-tuned with its statistics held, by a train() of its own."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("training", [True, False])
def test_norms_held_in_evaluation_by_train(training):
    loader = data(6)
    model = NormEval()
    model.extra = nn.BatchNorm1d(4)
    model.forward = lambda x: model.extra(Encoder.forward(model, x))
    trained_like(model, loader)
    model.norm.running_mean += 0.5  # those of the data it was pre-trained on, which its weights have met
    with torch.no_grad():
        pool = torch.cat([Encoder.forward(model, x) for x in loader])
        model.extra.running_mean.copy_(pool.mean(0))
        model.extra.running_var.copy_(pool.var(0))
    report = assert_healthy(model.train(training), loader)
    assert [layer.held for layer in report.evidence.layers] == [True, False]


def test_some_norms_frozen_and_others_not():
    loader = data(6)
    model = trained_like(nn.Sequential(Encoder(), nn.BatchNorm1d(4)), loader).train()
    model[0].norm.eval().requires_grad_(False)
    assert_healthy(model, loader)


# --- forms of batches and outputs ---------------------------------------------------------------------------


class LossInTraining(Encoder):
    def forward(self, x):
        out = super().forward(x)
        return {"loss": out.square().mean()} if self.training else out


class WantsTargets(Encoder):
    def forward(self, x, y=None):
        if self.training and y is None:
            raise ValueError("in training, targets are needed")
        return super().forward(x)


@pytest.mark.parametrize("kind", [LossInTraining, WantsTargets])
def test_a_forward_that_is_another_in_training(kind):
    loader = [(x, torch.arange(SIZE) % 4) for x in data(6)]
    assert_healthy(trained_like(kind(), loader), loader, loss=F.cross_entropy)
    assert_healthy(trained_like(kind(), loader), loader)


class OfImages(nn.Module):
    """Images of different sizes, one by one or together, to one row each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        sizes = [image.shape[-1] for image in images]
        padded = [F.pad(image, (0, 12 - s, 0, 12 - s)) for image, s in zip(images, sizes, strict=True)]
        return self.norm(self.conv(torch.stack(padded))).mean((2, 3))


def ragged(number: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(8, 13, (number,), generator=generator).tolist()
    return [torch.randn(3, s, s, generator=generator) for s in sizes]


Boxes = namedtuple("Boxes", "images targets")
FORMS = {
    "images": lambda images: images,
    "images and targets": lambda images: (images, [{"boxes": torch.rand(2, 4)} for _ in images]),
    "tuples": lambda images: Boxes(tuple(images), tuple(torch.rand(k + 1, 4) for k in range(len(images)))),
    "samples": lambda images: [(image, torch.tensor(1)) for image in images],
    "dicts": lambda images: [{"image": image, "id": k} for k, image in enumerate(images)],
    "a dict": lambda images: {"image": images, "name": ["x"] * len(images)},
}


def images_of(batch):
    if isinstance(batch, dict):
        return batch["image"]
    if isinstance(batch, Boxes) or isinstance(batch[0], list):
        return batch[0]
    return [b if isinstance(b, torch.Tensor) else b["image"] if isinstance(b, dict) else b[0] for b in batch]


@pytest.mark.parametrize("form", FORMS)
def test_batches_that_are_lists_are_counted_by_their_items(form):
    loader = [FORMS[form](ragged(size, size)) for size in (17, 16, 16, 11)]

    def forward(model, batch):
        return model(images_of(batch))

    model = trained_like(OfImages(), loader, forward_fn=forward)
    report = assert_healthy(model, loader, forward_fn=forward)
    assert report.evidence.batch_images == (17, 16, 16, 11)
    assert report.evidence.not_examined == []
    assert report.evidence.batch_dependence is not None


# --- norms of one's own -------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """Batch normalization that is neither torch's nor ours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x):
        if not self.training:
            return (x - self.average) / self.spread
        mean, deviation = x.mean(0), x.std(0)
        with torch.no_grad():
            self.average.lerp_(mean, 0.1)
            self.spread.lerp_(deviation, 0.1)
        return (x - mean) / (deviation + 1e-5)


class OwnNormInAttributes(OwnNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.average, self.spread
        self.average, self.spread = torch.zeros(channels), torch.ones(channels)


class NormInForward(nn.Module):
    """The same in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        self.inner.training = self.training
        return self.head(OwnNorm.forward(self.inner, x))


def own(kind):
    return nn.Sequential(kind(6), nn.Dropout(0.1), nn.Linear(6, 4))


OWN = [(own, OwnNorm, True), (own, OwnNorm, False), (own, OwnNormInAttributes, True)]
OWN += [(own, OwnNormInAttributes, False), (lambda kind: kind(), NormInForward, True)]


@pytest.mark.parametrize(("make", "kind", "with_loss"), OWN)
def test_a_gap_is_found_whoever_made_the_layer(make, kind, with_loss):
    torch.manual_seed(0)
    model = make(kind)
    loader = [(x * 3 + 5, torch.arange(SIZE) % 4) for x in data(6)]
    loss = F.cross_entropy if with_loss else None
    report = gb.diagnose(model.eval(), loader, loss=loss)
    assert not report.healthy
    assert {f.check for f in report.at_least("warning")} == {"train-eval-gap"}
    with torch.no_grad():
        for _ in range(30):
            for x, _y in loader:
                model.train()(x)
    assert_healthy(model.eval(), loader, loss=loss)


def test_a_gap_without_any_statistics_is_found():
    class Halves(nn.Module):
        def forward(self, x):
            return x if self.training else x * 0

    loader = [(torch.eye(4).repeat(8, 1) * 9, torch.arange(32) % 4)] * 2
    report = gb.diagnose(Halves(), loader, loss=F.cross_entropy)
    assert [(f.check, f.severity) for f in report.at_least("warning")] == [("train-eval-gap", "error")]


WITHOUT = {
    "group": [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(0.3)],
    "instance": [nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU()],
    "spectral": [nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))],
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_models_without_batch_norm(kind):
    model = nn.Sequential(*WITHOUT[kind], nn.Flatten(), nn.Linear(144, 4))
    loader = [(x, torch.arange(SIZE) % 4) for x in data(3, 8, 8)]
    assert_healthy(model.eval(), loader, loss=F.cross_entropy)
    assert_healthy(model.train(), loader)
