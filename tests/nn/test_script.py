"""``torch.jit.script`` cannot compile our layers; the error names what it can."""

import pytest
import torch

import gammabeta as gb

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")  # deprecated, and used

KINDS = ("BatchNorm2d", "LazyBatchNorm2d", "SyncBatchNorm", "GhostBatchNorm2d", "FrozenBatchNorm2d")


@pytest.mark.parametrize("kind", KINDS)
def test_scripting_a_layer_names_the_way_back_to_torch(kind):
    layer = getattr(gb.nn, kind)(*(() if kind.startswith("Lazy") else (3,)))
    for model in (layer, torch.nn.Sequential(torch.nn.Sequential(layer, torch.nn.ReLU()))):
        with pytest.raises(gb.errors.UsageError, match=r'script gammabeta.convert\(model, to="torch"\)'):
            torch.jit.script(model)


def test_scripting_a_converted_model_names_a_way_that_works():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    converted = gb.convert(model)
    with pytest.raises(gb.errors.UsageError, match='to="torch"'):
        torch.jit.script(converted)
    scripted = torch.jit.script(gb.convert(converted, to="torch"))
    torch.testing.assert_close(scripted(x), model(x))
