"""What is chance, padding or rounding is no finding; beside each its sick twin, which is."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.doctor.resample import Reservoir, of_size


def deep(norms: int = 10) -> nn.Sequential:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(norms)]
    return nn.Sequential(*blocks, nn.Linear(8, 4))


def gaps(model, loader, **options):
    return [f for f in gb.diagnose(model.eval(), loader, **options).findings if f.check == "train-eval-gap"]


def test_noise_of_small_batches_is_a_note_and_that_of_grouped_ones_a_finding():
    x = torch.randn(256, 8)
    grouped = x + torch.arange(16).repeat_interleave(16)[:, None] - 8.0
    for data, expected in ((x, "note"), (grouped[torch.randperm(256)], "note"), (grouped, "error")):
        model, loader = deep(), data.split(16)
        gb.recalibrate(model, loader)
        (finding,) = gaps(model, loader)
        assert finding.severity == expected, finding


def test_calls_that_differ_are_no_chance():
    class Shared(nn.Module):
        """One norm for two kinds of input."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(torch.cat([self.norm(x), self.norm(5 - 3 * x.square())], 1))

    loader = torch.randn(1024, 8).split(64)
    model = gb.recalibrate(Shared(), loader)
    (finding,) = gaps(model, loader)
    assert finding.severity in ("error", "warning")


def test_the_part_that_is_due_to_size():
    assert of_size(0.4, 0.1, 4) == pytest.approx(0.4)  # as 1/n
    assert of_size(0.4, 0.4, 4) == 0.0
    assert of_size(0.4, 0.25, 4) == pytest.approx(0.2)
    assert of_size(-0.1, 0.0, 4) == 0.0


def test_a_reservoir_keeps_samples_evenly_and_whole():
    kept = Reservoir()
    for start in range(0, 4000, 40):
        numbers = torch.arange(start, start + 40)
        kept.offer((numbers[:, None].float(), {"label": numbers}), 40)
    *parts, whole = kept.batches()
    assert [len(x) for x, _ in parts] == [40] * 4
    for x, y in (*parts, whole):
        assert torch.equal(x[:, 0].long(), y["label"])
    assert len(set(whole[1]["label"].tolist())) == 160
    assert abs(float(whole[0].mean()) - 2000) < 400


@pytest.mark.parametrize("tracked", [True, False])
def test_rounding_of_half_precision_is_no_dependence(tracked):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=tracked), nn.Flatten(), nn.Linear(1600, 4)
    )
    loader = torch.randn(64, 3, 12, 12).split(32)

    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    if tracked:
        gb.recalibrate(model, loader)
    report = gb.diagnose(model.eval(), loader, forward_fn=forward)
    assert [f.check for f in report.at_least("warning")] == ([] if tracked else ["batch-dependence"])


@pytest.mark.parametrize("tracked", [True, False])
def test_padding_to_the_largest_of_a_batch_is_no_dependence(tracked):
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.norm = nn.BatchNorm2d(8, track_running_stats=tracked)

        def forward(self, pictures):
            size = max(picture.shape[-1] for picture in pictures)
            padded = [F.pad(p, (0, size - p.shape[2], 0, size - p.shape[1])) for p in pictures]
            return self.head(self.norm(self.conv(torch.stack(padded))).relu().mean((2, 3)))

    sizes = torch.randint(8, 16, (64,)).tolist()
    pictures = [torch.randn(3, n, n) for n in sizes]
    loader = [(pictures[i : i + 16], torch.zeros(16)) for i in range(0, 64, 16)]
    model = Detector()
    if tracked:
        gb.recalibrate(model, loader)
    report = gb.diagnose(model.eval(), loader)
    assert report.evidence.not_examined == []
    assert [f.check for f in report.at_least("warning")] == ([] if tracked else ["batch-dependence"])


class Limited(nn.Module):
    """Refuses what is larger than its loader's batches, and keeps a record."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep()
        self.seen: list[int] = []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > 16:
            raise RuntimeError("no more")
        return self.net(x + 0.1 * torch.rand_like(x))


def state(model: Limited) -> list[object]:
    numbers = [tensor.clone().numpy().tobytes() for tensor in model.state_dict().values()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [numbers, modes, hooks, list(model.seen), torch.get_rng_state().tolist()]


def test_batches_that_the_model_refuses_are_not_examined():
    loader = torch.randn(256, 8).split(16)
    model = Limited()
    gb.recalibrate(model, loader)
    before = state(model.eval())
    report = gb.diagnose(model, loader)
    assert state(model) == before
    assert any(line.startswith("batches drawn anew: RuntimeError") for line in report.evidence.not_examined)
