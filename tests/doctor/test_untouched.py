"""diagnose leaves no trace in the model or in any random state, whether it succeeds or fails."""

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gammabeta as gb


class Net(nn.Module):
    """Convolutions, dropout, a reused layer, one frozen, one without affine, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.reused = nn.BatchNorm2d(4, affine=False)
        self.frozen = nn.BatchNorm2d(4).requires_grad_(False)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.notes = torch.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.reused(x) + self.reused(2 * x)
        x = self.bare(self.frozen(x))
        self.notes += 1
        return self.head(self.cumulative(self.drop(x.mean((2, 3)))))


def everything(model: nn.Module) -> dict[str, object]:
    return {
        "state": {key: value.numpy().tobytes() for key, value in model.state_dict().items()},
        "buffers": [id(buffer) for buffer in model.buffers()],
        "grads": [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
        "grad ids": [id(p.grad) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "momentum": [getattr(m, "momentum", 0) for m in model.modules()],
        "tracking": [getattr(m, "track_running_stats", 0) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "plain": [m.notes.numpy().tobytes() for m in model.modules() if isinstance(m, Net)],
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    }


def prepared(training: bool) -> Net:
    model = Net().train(training)
    model.frozen.eval()
    model.notes += 5
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    model.conv.register_forward_hook(lambda *_: None)
    return model


def data() -> TensorDataset:
    return TensorDataset(torch.randn(50, 1, 8, 8), torch.randint(0, 3, (50,)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own_generator", [True, False])
def test_nothing_changes(training, own_generator):
    model = prepared(training)
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = DataLoader(data(), batch_size=16, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    before = everything(model)
    own = generator.get_state() if generator is not None else None
    report = gb.diagnose(model, loader, loss=F.cross_entropy, optimizer=optimizer)
    assert everything(model) == before
    if generator is not None:
        assert torch.equal(generator.get_state(), own)
    assert report.evidence.not_examined == []
    assert report.evidence.updated_in_backward == ()


class Fails:
    """Raises in the given call, counted over all forward passes."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: nn.Module, batch: object) -> torch.Tensor:
        self.left -= 1
        out = model(batch[0])
        if self.left == 0:
            raise RuntimeError("broken in the middle")
        return out


@pytest.mark.parametrize("at", [1, 2, 3, 4, 9, 10, 11, 12, 14, 19, 20, 24])
def test_nothing_changes_when_the_model_raises(at):
    model = prepared(training=True)
    loader = DataLoader(data(), batch_size=16)
    before = everything(model)
    fails = Fails(at)
    failures = []
    with suppress(RuntimeError):
        failures = gb.diagnose(model, loader, loss=F.cross_entropy, forward_fn=fails).evidence.not_examined
        assert "broken in the middle" in failures[0]
    assert fails.left <= 0
    assert everything(model) == before


def test_nothing_changes_when_the_loader_raises():
    model = prepared(training=False)
    x, y = data().tensors

    class Breaks:
        def __iter__(self):
            yield x[:16], y[:16]
            yield x[16:32], y[16:32]
            raise OSError("disk gone")

    before = everything(model)
    with pytest.raises(OSError, match="disk gone"):
        gb.diagnose(model, Breaks(), loss=F.cross_entropy)
    assert everything(model) == before


def test_inference_mode_and_an_optimizer_that_steps_in_backward():
    model = prepared(training=False)
    loader = [(torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))) for _ in range(3)]
    with torch.inference_mode():
        before = everything(model)
        gb.diagnose(model, loader, loss=F.cross_entropy)
        assert everything(model) == before
    steps: list[int] = []
    model.head.weight.register_post_accumulate_grad_hook(lambda _: steps.append(1))
    report = gb.diagnose(model, loader)
    assert steps == []
    assert "hooks of their own" in report.evidence.not_examined[0]


def test_each_sample_runs_at_most_six_times_and_memory_is_flat():
    model = prepared(training=False)
    seen = 0

    def count(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen += len(inputs[0])

    model.conv.register_forward_pre_hook(count)
    for loss in (F.cross_entropy, None):
        seen = 0
        report = gb.diagnose(model, DataLoader(data(), batch_size=16, shuffle=True), loss=loss)
        # A trace, a gradient, a batch in both modes, a sample's company: not per pass over the data.
        probes = 2 + 2 + 2 * 16 + 5 * 8
        assert seen <= 6 * 50 + probes
        assert seen - probes <= (4 if loss else 5) * 50
        assert report.evidence.samples == 50

    class Endless:
        """Batches made on the fly: what a report keeps of them must not grow."""

        def __iter__(self):
            while True:
                yield torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))

    few, many = (
        gb.diagnose(model, Endless(), loss=F.cross_entropy, samples=samples).evidence for samples in (32, 640)
    )
    assert tensor_bytes(few.activity) == tensor_bytes(many.activity)


def tensor_bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    return sum(map(tensor_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0
