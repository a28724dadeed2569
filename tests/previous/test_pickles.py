"""Models that an earlier version wrote are read, and give what they gave then. ``make.py`` wrote them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import gammabeta as gb

FILES = sorted(Path(__file__).parent.glob("*.pt"))


def test_there_are_files():
    assert len(FILES) == 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_model_of_an_earlier_version(path, tmp_path):
    saved = torch.load(path, weights_only=False)
    model, x, expected = saved["model"], saved["input"], saved["output"]
    with torch.no_grad():
        # Another machine's kernels may sum in another order.
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        again = tmp_path / "again.pt"
        torch.save(model, again)
        assert torch.equal(torch.load(again, weights_only=False)(x), model(x))


def _load(name: str) -> nn.Module:
    (path,) = (path for path in FILES if path.stem.endswith(name))
    model: nn.Module = torch.load(path, weights_only=False)["model"]
    return model


def test_reports_of_an_earlier_version():
    report = _load("converted").conversion_report
    assert [change.folded for change in report.fused] == [
        "relu + 2x2 max pool",
        "relu",
        "residual + relu",
        "relu + 2x2 mean pool",
    ]
    assert "norm_b" in str(report)
    assert report.to_dict()["changes"][0]["folded"] == "relu + 2x2 max pool"
    packed = _load("packed").fold_report
    assert packed.packed == ("stem.0", "conv_a", "conv_b", "last.0", "head")
    assert "4 of 4 folded" in str(packed)


def test_a_converted_model_of_an_earlier_version_is_undone():
    model, x = _load("converted"), torch.randn(2, 3, 16, 16)
    plain = gb.convert(model, to="torch", example=x)
    assert type(plain).__name__ == "Residual"
    assert not any(type(module).__module__.startswith("gammabeta") for module in plain.modules())
