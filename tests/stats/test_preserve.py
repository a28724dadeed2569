"""What a run of a model may change, kind by kind, is put back; what cannot be is named."""

import random
from collections import Counter, deque
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import gammabeta as gb
import gammabeta.doctor  # here, since importing rich draws a random number
from gammabeta.errors import SurgeryError
from gammabeta.stats.preserve import preserved


class Recorder:
    """A plain object that notes what it is shown."""

    __slots__ = ("last", "notes")

    def __init__(self) -> None:
        self.notes: list[float] = []
        self.last = 0


class Momentum(nn.Module):
    """A momentum encoder: its forward moves parameters, in place, by ``.data`` and by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.online, self.target = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other = nn.Parameter(torch.zeros(3))
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                slow.data = 0.5 * slow.data + 0.5 * fast.data
            self.mean.data.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.other.add_(1)
        return self.target(self.norm(x)) + self.mean


class Writes(nn.Module):
    """Writes into everything else that a module can hold."""

    steps, seen = 0, []

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.count, self.log, self.by_kind = 0, [1.0], {"a": [0]}
        self.recent, self.kinds, self.tally = deque([1], maxlen=2), {1}, Counter("a")
        self.table, self.queue = np.zeros(3), [torch.zeros(3)]
        self.recorder, self.nested = Recorder(), ({"x": torch.zeros(2)},)
        self.generator = torch.Generator().manual_seed(1)
        self.dice, self.numbers = random.Random(3), np.random.default_rng(3)
        self.parameter = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).steps += 1
        self.seen.append(1)
        self.count += 1
        self.log.append(2.0)
        self.by_kind["a"].append(1)
        self.by_kind["b"] = []
        self.recent.append(7)
        self.kinds.add(9)
        self.tally["b"] += 1
        self.table += 1
        self.queue[0] += 1
        self.queue.append(x)
        self.recorder.notes.append(1.0)
        self.recorder.last += 1
        self.nested[0]["x"] += 1
        self.fresh = x
        self.parameter.requires_grad_(False)
        self.norm.momentum = 0.9
        self.norm.training = False
        torch.rand(1, generator=self.generator)
        torch.rand(1), random.random(), np.random.rand(), self.dice.random(), self.numbers.random()  # noqa: NPY002
        return self.norm(x)


def content(value: object) -> object:
    """A value as one that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist(), value.requires_grad, value.data_ptr(), id(value)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return [(key, content(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [content(item) for item in value]
    if isinstance(value, nn.Module):
        return content(vars(value))
    if isinstance(value, Recorder):
        return value.notes[:], value.last
    return str(value)


def everything(model: nn.Module) -> object:
    rng = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    return content(model), Writes.steps, Writes.seen[:], rng


@pytest.mark.parametrize("build", [Momentum, Writes])
@pytest.mark.parametrize("inference", [True, False])
def test_whatever_a_forward_writes_is_put_back(build, inference):
    model, x = build(), torch.randn(8, 3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(model)
    with torch.inference_mode(inference):
        gb.diagnose(model, [x, x + 1])
    assert everything(model) == before
    gb.recalibrate(model, [x, x + 1])
    with torch.no_grad():
        model.norm.running_mean.zero_()
        model.norm.running_var.fill_(1)
        model.norm.num_batches_tracked.zero_()
    assert everything(model) == before


def test_it_is_put_back_when_the_forward_raises():
    model = Writes()
    before = everything(model)
    with suppress(RuntimeError), preserved(model):
        model(torch.randn(8, 3))
        model(torch.randn(8, 4))
    assert everything(model) == before


def test_what_a_hook_keeps_is_put_back():
    model, seen, calls = nn.Sequential(nn.BatchNorm1d(3)), [], 0

    def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        seen.append(output)

    model.register_forward_hook(hook)
    with preserved(model):
        model(torch.randn(4, 3))
        assert (calls, len(seen)) == (1, 1)
    assert (calls, len(seen)) == (0, 0)


def test_gradients_are_put_back():
    class ClearsGradients(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.grad.zero_()
            self.bias.grad = None
            return x * self.weight

    model = ClearsGradients()
    model.weight.grad, model.bias.grad = torch.ones(3), torch.ones(3)
    kept = model.bias.grad
    with preserved(model):
        model(torch.randn(4, 3))
    assert torch.equal(model.weight.grad, torch.ones(3))
    assert model.bias.grad is kept


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_scripted_module_keeps_its_mode_and_tensors():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with preserved(model):
        model(torch.randn(8, 3))
        model.eval()
    assert model.training
    assert model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_put_back_is_named():
    class Locked(nn.Module):
        """Its forward makes an array read-only after changing it."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.log = np.zeros(3), [0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.table += 1
            self.table.flags.writeable = False
            self.log.append(1)
            return x

    model = Locked()
    with pytest.raises(SurgeryError, match="changed table in a way"), preserved(model):
        model(torch.ones(2))
    assert model.log == [0]
