"""One run recorded: values, calls and forwards, and what else happens to a value."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammabeta.graph.record import Recording, map_tensors, record, tensors_in


class Pair(NamedTuple):
    """A named tuple keeps its class."""

    tensor: Tensor
    number: int


def recorded(model: nn.Module, x: Tensor, *leaves: type[nn.Module], kept: bool = True) -> Recording:
    """A run of a model in evaluation mode."""
    model.eval()
    return record(model, lambda: model(x), lambda module: isinstance(module, leaves), kept=kept)


class Branches(nn.Module):
    """A value with two readers, one of which reads its shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        """Run (N, 4)."""
        y = self.linear(x)
        return self.norm(y) + torch.ones_like(y)  # type: ignore[no-any-return]


def test_values_calls_and_forwards() -> None:
    recording = recorded(Branches(), torch.randn(2, 4), nn.BatchNorm1d)
    assert [call.name for call in recording.calls] == ["linear", "module", "ones_like", "add"]
    assert [forward.path for forward in recording.forwards] == ["", "linear", "norm"]
    linear, norm, ones, add = recording.calls
    value = linear.outputs[0]
    assert (value.origin, value.producer) == ("data", linear)
    assert value.users == [norm]  # `ones_like` asks for its shape only
    assert linear.args[1].names == ("linear.weight",)
    assert linear.args[1].origin == "state"
    assert ones.outputs[0].origin == "constant"
    assert add.outputs[0].watchers == ["is part of the model's output"]
    assert norm.module is recording.forwards[2].module
    assert [f.path for f in norm.forward.outwards()] == ["norm", "", ""]


def test_a_decision_on_data_is_marked() -> None:
    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    (forward,) = recorded(Decides(), torch.ones(2)).forwards
    assert forward.reads == "__bool__"


def test_what_outlives_the_run_is_told_if_asked() -> None:
    held: list[Tensor] = []

    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            held.append(x * 2)
            return held[-1] + 1

    for kept in (True, False):
        first = recorded(Keeps(), torch.ones(2), kept=kept).calls[0]
        assert first.outputs[0].watchers == (["is kept after the forward"] if kept else [])


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_written_to_is_another_value(inference: bool) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            F.relu(y, inplace=True)
            y += 1
            return y.contiguous()

    with torch.inference_mode(inference):
        recording = recorded(Writes(), torch.randn(3))
    double, relu, add, idle = recording.calls
    assert relu.args[0] is double.outputs[0]
    assert add.args[0] is relu.outputs[0]
    assert add.outputs[0] is not relu.outputs[0]
    # What hands back what it was given makes no value, and is no reader.
    assert (idle.name, idle.outputs, add.outputs[0].users) == ("contiguous", [], [])


def test_the_model_is_as_it_was() -> None:
    model = Branches()
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError):
        recorded(model, torch.randn(2, 5))
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tensors_in_and_map_tensors() -> None:
    tree = {"a": [torch.zeros(1), (torch.ones(2), 3)], "b": "text"}
    assert [t.numel() for t in tensors_in(tree)] == [1, 2]
    doubled = map_tensors(tree, lambda t: t + 1)
    assert doubled["b"] == "text"
    assert type(doubled["a"]) is list
    assert doubled["a"][1][1] == 3
    assert torch.equal(doubled["a"][0], torch.ones(1))
    pair = Pair(torch.zeros(1), 2)
    assert map_tensors(pair, lambda t: t + 1) == Pair(torch.ones(1), 2)
