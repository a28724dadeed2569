"""The table of activations: a row says what one is to PyTorch and in the documentation."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gammabeta import elementary, epilogue, kernels
from gammabeta.epilogue import (
    ACTIVATIONS,
    Activation,
    Epilogue,
    MaxPool,
    activation_of_call,
    activation_of_module,
)

Z = torch.tensor([-9.0, -3.0, -0.7, 0.0, 1.3, 3.0, 6.0, 7.5, float("nan")], dtype=torch.float64)


def made(row: Activation, **more: object) -> nn.Module:
    return row.module(**row.settings, **more)


def test_the_reference_has_the_same_activations() -> None:
    assert list(elementary.ACTIVATIONS) == list(ACTIVATIONS)


@pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_everything_in_a_row_computes_the_same(row: Activation) -> None:
    expected = elementary.ACTIVATIONS[row.name](Z)
    calls = [getattr(Tensor, call) if isinstance(call, str) else call for call in row.calls]
    for function in (row.function, made(row), *calls):
        torch.testing.assert_close(function(Z.clone()), expected, equal_nan=True)
    assert row.is_module(made(row))
    assert all(row.is_call(call, (), {}) for call in (row.function, *row.calls))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.01, inplace=True), "leaky_relu"),
        (nn.GELU(), "gelu"),
        (nn.LeakyReLU(0.2), None),
        (nn.GELU("tanh"), None),
        (nn.Hardtanh(0.0, 6.0), None),  # ReLU6 is a subclass of it
        (type("Mine", (nn.ReLU,), {})(), None),  # may compute something else
        (nn.Softmax(1), None),
    ],
    ids=str,
)
def test_modules(module: nn.Module, name: str | None) -> None:
    assert activation_of_module(module) == name


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "name"),
    [
        (F.relu, (), {"inplace": True}, "relu"),
        (F.relu, (True,), {}, "relu"),
        ("relu_", (), {}, "relu"),
        (Tensor.relu, (), {}, "relu"),
        (F.leaky_relu, (0.01,), {}, "leaky_relu"),
        (F.leaky_relu, (0.01, True), {}, "leaky_relu"),
        (F.leaky_relu, (), {"negative_slope": 0.01, "inplace": True}, "leaky_relu"),
        (F.leaky_relu_, (0.01,), {}, "leaky_relu"),
        (F.gelu, (), {"approximate": "none"}, "gelu"),
        (F.silu, (), {"inplace": False}, "silu"),
        (F.leaky_relu, (0.2,), {}, None),
        (F.leaky_relu, (), {"negative_slope": 0.2}, None),
        (F.leaky_relu_, (0.2,), {}, None),
        (F.gelu, (), {"approximate": "tanh"}, None),
        (F.relu, (), {"unknown": 1}, None),
        (F.relu, (True, 1), {}, None),
        (F.leaky_relu, (0.01, True, 1), {}, None),
        ("silu", (), {}, None),  # no tensor has such a method
        (torch.cumsum, (), {}, None),
    ],
)
def test_calls(
    function: object, args: tuple[object, ...], kwargs: dict[str, object], name: str | None
) -> None:
    assert activation_of_call(function, args, kwargs) == name


def test_an_epilogue_says_what_it_is() -> None:
    assert str(Epilogue()) == ""
    assert str(Epilogue("relu", 2)) == "relu + 2x2 mean pool"
    assert str(Epilogue(None, MaxPool(3, 2, 1))) == "3x3 max pool"


# --- a new row --------------------------------------------------------------------------------------------


def test_arithmetic_that_differs_from_the_table_is_refused() -> None:
    epilogue.require_arithmetic("toy", set(ACTIVATIONS))
    for names, said in ((set(ACTIVATIONS) - {"silu"}, "'toy'.*: silu"), ({*ACTIVATIONS, "mish"}, ": mish")):
        with pytest.raises(NotImplementedError, match=said):
            epilogue.require_arithmetic("toy", names)


@pytest.mark.parametrize("module", ["cpu.jit.activations", "gpu.tiles"])
def test_a_row_without_arithmetic_stops_the_import(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is run once more, under a name of its own."""
    pytest.importorskip({"gpu": "triton", "cpu": "numba"}[module.split(".")[0]])
    path = Path(kernels.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    parent = f"gammabeta.kernels.{module.rpartition('.')[0]}"
    importlib.import_module(parent)

    def run() -> None:
        spec = importlib.util.spec_from_file_location(f"{parent}.once_more", path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    run()
    mish = Activation("mish", "z tanh(log(1 + exp(z)))", "", F.mish, nn.Mish)
    monkeypatch.setitem(ACTIVATIONS, "mish", mish)
    with pytest.raises(NotImplementedError, match="differ: mish"):
        run()


# --- the documentation ------------------------------------------------------------------------------------


def documented() -> str:
    """The table of docs/nn.md."""
    lines = ["| `activation=` | computes, of z | derivative | the same module |", "|---|---|---|---|"]
    for row in ACTIVATIONS.values():
        settings = ", ".join(f"{name}={value!r}" for name, value in row.settings.items())
        module = f"`nn.{row.module.__name__}({settings})`"
        lines.append(f'| `"{row.name}"` | {row.formula} | {row.derivative} | {module} |')
    return "\n".join(lines)


def test_the_documentation_lists_every_row() -> None:
    page = (Path(__file__).parents[1] / "docs/nn.md").read_text(encoding="utf-8")
    found = page.partition("<!-- activations: begin -->\n")[2].partition("\n<!-- activations: end -->")[0]
    assert found == documented(), f"docs/nn.md wants between its markers:\n{documented()}"
