import hashlib
import pickle

import pytest
import torch
from torch import nn

from gammabeta.errors import UsageError
from gammabeta.train import DigitNetwork
from gammabeta.train.batches import generator_for
from gammabeta.train.network import initialize_he, initialize_like_notebook


def fingerprint(model: nn.Module) -> str:
    """Hash every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_trace_prints_the_notebooks_shapes() -> None:
    shapes = DigitNetwork().trace(torch.randn(64, 1, 28, 28))
    wanted = {
        "h1": (64, 20, 13, 13),
        "h2": (64, 50, 4, 4),
        "flat": (64, 800),
        "h3": (64, 128),
        "output": (64, 10),
    }
    assert {name: shapes[name] for name in wanted} == wanted
    assert list(shapes) == ["conv1", "h1", "conv2", "h2", "flat", "fc1", "h3", "output"]


@pytest.mark.parametrize(
    ("channels", "size", "classes"), [(3, (32, 32), 10), (1, (16, 40), 2), (2, (17, 16), 26)]
)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_any_channels_size_and_classes(
    channels: int, size: tuple[int, int], classes: int, batch_norm: bool
) -> None:
    network = DigitNetwork(channels, size, classes, batch_norm=batch_norm)
    assert network(torch.randn(2, channels, *size)).shape == (2, classes)


@pytest.mark.parametrize("arguments", [(1, (15, 28), 10), (1, (28, 28), 1), (0, (28, 28), 10)])
def test_what_cannot_be_built_is_refused(arguments: tuple[int, tuple[int, int], int]) -> None:
    with pytest.raises(UsageError):
        DigitNetwork(*arguments)


def test_inspect_tells_statistics_and_changes_nothing() -> None:
    network = DigitNetwork()
    x = torch.randn(8, 1, 28, 28)
    network(x)
    before = fingerprint(network)
    views = {view.name: view for view in network.inspect(x)}
    assert fingerprint(network) == before
    assert network.training
    conv = network.conv1(x)
    view = views["bn1"]
    assert view.batch_mean is not None
    assert view.batch_var is not None
    assert view.output is not None
    torch.testing.assert_close(view.batch_mean, conv.mean((0, 2, 3)))
    torch.testing.assert_close(view.batch_var, conv.var((0, 2, 3), correction=0))
    torch.testing.assert_close(view.running_mean, network.bn1.running_mean)
    assert view.shape == tuple(view.output.shape) == (8, 20, 13, 13)
    assert views["conv2"].batch_mean is None


def test_a_pickle_of_0_1_0_loads() -> None:
    """There the network flattened in its forward, and had no layer for it."""
    network = DigitNetwork().eval()
    state = {**vars(network), "_modules": dict(network._modules)}
    del state["_modules"]["flat"]
    loaded = DigitNetwork.__new__(DigitNetwork)
    loaded.__setstate__(state)
    assert [name for name, _ in loaded.named_children()] == [name for name, _ in network.named_children()]
    assert not loaded.flat.training
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded(x), network(x))
    assert set(pickle.loads(pickle.dumps(network)).state_dict()) == set(network.state_dict())


def test_initialisations_have_the_moments_they_promise() -> None:
    network = DigitNetwork()
    initialize_like_notebook(network, generator_for(0, 0))
    assert float(network.fc1.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert float(network.bn3.weight.detach().mean()) == pytest.approx(1, abs=0.01)
    assert float(network.bn3.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    assert float(network.fc1.bias.detach().std()) == pytest.approx(0.01, rel=0.3)
    initialize_he(network, generator_for(0, 0))
    assert float(network.fc1.weight.detach().std()) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert not network.fc1.bias.any()
