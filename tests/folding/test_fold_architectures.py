"""Public architectures, those that are installed: right, and as many folds as torch.fx's fuser finds."""

import sys
from pathlib import Path

import pytest

_BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, _BENCHMARKS)
try:
    import fold_architectures
finally:
    sys.path.remove(_BENCHMARKS)

MODULES = {
    "pytorchcv": "pytorchcv",
    "monai": "monai",
    "efficientnet-pytorch": "efficientnet_pytorch",
    "transformers": "transformers",
    "dcgan-pytorch": "dcgan_pytorch",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # other people's code
@pytest.mark.parametrize("name", fold_architectures.ARCHITECTURES)
def test_architecture(name):
    pytest.importorskip(MODULES[name.split()[0]])
    row = fold_architectures.measure(name)
    assert row.norms > 0
    assert row.error <= 1e-5
    assert row.native_error <= 1e-5 + 2 * row.original_error
    assert row.folded + row.guarded >= (row.fx_folded or 0)
    assert row.taken_back == 0
