"""How batches of any kind are counted, cut and given to a model."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gammabeta as gb
from gammabeta.errors import UsageError
from gammabeta.stats.batches import call, move, target
from gammabeta.stats.samples import count, join, take


@dataclass(frozen=True)
class Graph:
    """A batch that is an object."""

    x: Tensor
    name: str = "a"


class Graphs:
    """Another, that counts itself."""

    def __init__(self, count: int) -> None:
        self.num_graphs, self.x = count, torch.randn(5 * count, 3)


def image(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(3, height, width)


LABELS = torch.zeros(6)
SIZES = [
    (torch.randn(6, 3), 6),
    ((torch.randn(6, 3, 8, 8), LABELS), 6),
    ([torch.randn(6, 3), torch.randn(6, 3)], 6),
    ([[torch.randn(6, 3), torch.randn(6, 4)], LABELS], 6),
    ((torch.randn(6, 3, 9), torch.randn(6, 3, 9)), 6),
    ({"a": "text", "b": torch.randn(6, 3)}, 6),
    (([image() for _ in range(6)], LABELS), 6),
    ([image(8, 8 + i) for i in range(6)], 6),
    (([image(8, 8 + i) for i in range(2)], [{"boxes": torch.zeros(1, 4)}] * 2), 2),
    ([torch.randn(4 + i) for i in range(6)], 6),
    ([{"image": image()} for _ in range(6)], 6),
    (Graph(torch.randn(6, 3)), 6),
    (Graphs(6), 6),
    ([Graph(torch.randn(2, 3)) for _ in range(6)], 6),
    (object(), 0),
    (torch.ones(5, 3), 5),
    (((torch.ones(5, 3), torch.ones(5, 7)), torch.ones(5)), 5),
    ([image()] * 6, 6),
    ([(image(), 4)] * 6, 6),
    ([[torch.ones(5, 3, 8, 8), torch.ones(5, 2)], [torch.ones(5), torch.ones(5)]], 5),
    (({"x": torch.ones(5, 3)}, {"y": torch.ones(5)}), 5),
    ((torch.ones(5, 3), torch.ones(5, 4), torch.ones(5, 2)), 5),
    (["a", "b"], 0),
    ((), 0),
]


@pytest.mark.parametrize(("batch", "samples"), SIZES)
def test_samples_are_counted(batch, samples):
    assert count(batch) == samples


CUT = [case for case in SIZES if not isinstance(case[0], Graph | Graphs) and case[1] > 1]


@pytest.mark.parametrize(("batch", "samples"), CUT)
def test_what_is_cut_into_samples_is_joined_again(batch, samples):
    parts = [take(batch, torch.tensor([index]), samples) for index in (0, 1)]
    both = take(batch, torch.tensor([0, 1]), samples)
    assert tree_map(str, join(parts)) == tree_map(str, both)


def test_a_list_of_samples_is_its_own_input_and_target():
    batch = [{"image": image(), "label": 1} for _ in range(4)]
    assert target(batch) is batch
    assert call(nn.Identity(), batch) is batch
    collated = [torch.ones(5, 3), torch.zeros(5)]  # as a DataLoader gives (input, target)
    assert call(nn.Identity(), collated) is collated[0]
    assert target(collated) is collated[1]


def test_lists_of_samples_are_cut_like_tensors():
    images = [image(8, 8 + i) for i in range(6)]
    taken, labels = take((images, torch.arange(6)), torch.tensor([1, 4]), 6)
    assert [t.shape[2] for t in taken] == [9, 12]
    assert labels.tolist() == [1, 4]


def test_objects_are_moved():
    graph = Graph(torch.randn(2, 3))
    moved = move(graph, torch.device("meta"), None)
    assert (moved.x.is_meta, moved.name, graph.x.is_meta) == (True, "a", False)


class Net(nn.Module):
    """Takes what ``inner`` gets out of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two inputs."""
        return self.norm(a + b)


class Wrapper(nn.Module):
    """A wrapper of ``**kwargs``, as adapters are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Pass on."""
        return self.inner(*args, **kwargs)


X = torch.randn(8, 3)


@pytest.mark.parametrize("model", [Net, Wrapper])
@pytest.mark.parametrize("batch", [(X, X, X), {"a": X}, {"image": X}, X], ids=["abc", "a", "image", "x"])
@pytest.mark.parametrize("what", [gb.recalibrate, gb.diagnose])
def test_a_batch_that_does_not_fit_is_told_in_one_line(model, batch, what):
    with pytest.raises(UsageError, match=r"forward cannot be called .*give forward_fn=") as caught:
        what(model(), [batch])
    assert "\n" not in str(caught.value)


def test_mappings_through_a_wrapper():
    assert call(Wrapper(), {"a": X, "b": X}).shape == (8, 3)


def test_an_error_of_the_models_own_passes_through():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + "a"

    with pytest.raises(TypeError, match=r"unsupported|argument"):
        call(Broken(), X)


class OfGraph(nn.Module):
    """Takes an object."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, graph: Graph) -> Tensor:
        """Normalise its nodes."""
        return self.norm(graph.x)


@pytest.mark.parametrize("forward_fn", [None, lambda model, batch: model(batch)])
@pytest.mark.parametrize("make", [Graph, lambda x: Graphs(len(x))])
def test_loaders_of_objects(make, forward_fn):
    loader = [make(torch.randn(32, 3)) for _ in range(4)]
    model = gb.recalibrate(OfGraph(), loader, forward_fn=forward_fn)
    report = gb.diagnose(model.eval(), loader, forward_fn=forward_fn)
    assert report.healthy, str(report)
    assert report.evidence.samples == 128


def test_lists_of_images():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.norm(torch.stack([x[:, :8, :8] for x in images])).mean((2, 3))

    loader = [([image(8, 8 + i) for i in range(16)], torch.zeros(16)) for _ in range(4)]
    model = gb.recalibrate(Detector(), loader).eval()
    report = gb.diagnose(model, loader)
    assert report.healthy, str(report)
    assert report.evidence.samples == 64
