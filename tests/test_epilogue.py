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
    epilogue_of,
    named,
    split,
)
from gammabeta.errors import UsageError

Z = torch.tensor([-9.0, -3.0, -0.7, 0.0, 1.3, 3.0, 6.0, 7.5, float("nan")], dtype=torch.float64)


def made(row: Activation, **more: object) -> nn.Module:
    return row.module(**row.settings, **more)


def test_the_reference_has_the_same_activations() -> None:
    assert list(elementary.ACTIVATIONS) == list(ACTIVATIONS)


@pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_everything_in_a_row_computes_the_same(row: Activation) -> None:
    expected = elementary.ACTIVATIONS[row.name](Z)
    calls = [getattr(Tensor, call) if isinstance(call, str) else call for call in row.calls]
    for function in (row.apply, made(row), *calls):
        torch.testing.assert_close(function(Z.clone()), expected, equal_nan=True)
    assert activation_of_module(made(row)) == row.name
    for call in (row.function, *row.calls):
        assert activation_of_call(call, (), row.settings) == row.name


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.01, inplace=True), "leaky_relu"),
        (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
        (nn.LeakyReLU(0), "leaky_relu(0.0)"),
        (nn.ELU(0.5), "elu(0.5)"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.Hardtanh(-2, 1), "hardtanh(-2.0, 1.0)"),
        (nn.LeakyReLU(float("nan")), None),
        (nn.LeakyReLU(torch.tensor(0.2)), None),  # its value may change
        (nn.PReLU(), None),
        (type("Mine", (nn.ReLU,), {})(), None),  # may compute something else
        (nn.Softmax(1), None),
    ],
    ids=str,
)
def test_modules(module: nn.Module, name: str | None) -> None:
    assert activation_of_module(module) == name


def test_a_module_whose_settings_were_changed() -> None:
    module = nn.ReLU6()
    module.max_val = 4.0
    assert activation_of_module(module) == "hardtanh(0.0, 4.0)"
    slope = nn.LeakyReLU()
    slope.negative_slope = [0.1]  # type: ignore[assignment]
    assert activation_of_module(slope) is None


def test_a_slope_that_always_changes_is_left_to_torch() -> None:
    """For each there would be a kernel to compile."""
    found = [activation_of_module(nn.ELU(0.25 + 0.001 * i)) for i in range(40)]
    assert found[-1] is None
    assert activation_of_module(nn.ELU()) == "elu"
    epilogue._MODULES[nn.ELU].names = {(1.0,): "elu"}


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
        (F.leaky_relu, (0.2,), {}, "leaky_relu(0.2)"),
        (F.leaky_relu, (), {"negative_slope": 0.2}, "leaky_relu(0.2)"),
        (F.leaky_relu_, (0.2, True), {}, "leaky_relu(0.2)"),
        (F.gelu, (), {"approximate": "tanh"}, "gelu_tanh"),
        (F.hardtanh, (0,), {"max_val": 6}, "relu6"),
        (F.hardtanh, (), {}, "hardtanh"),
        (F.hardtanh, (2, 1), {}, None),
        (F.elu, (2.0,), {"inplace": True}, "elu(2.0)"),
        ("tanh", (), {}, "tanh"),
        ("sigmoid_", (), {}, "sigmoid"),
        (F.leaky_relu, (0.2,), {"negative_slope": 0.2}, None),  # torch refuses it
        (F.leaky_relu, (Z,), {}, None),
        (F.leaky_relu, ([0.2],), {}, None),
        (F.gelu, (), {"approximate": "other"}, None),
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


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("leaky_relu(0.2)", "leaky_relu(0.2)"),
        ("leaky_relu(.01)", "leaky_relu"),
        ("hardtanh( -1,1 )", "hardtanh"),
        ("hardtanh(0, 6)", "relu6"),
        ("elu(5e-1)", "elu(0.5)"),
    ],
)
def test_names_with_numbers(given: str, name: str) -> None:
    found = named(given)
    assert found is not None
    assert found.name == name
    assert epilogue_of(given, None) == Epilogue(name)
    base, numbers = split(given)
    torch.testing.assert_close(elementary.ACTIVATIONS[base](Z, *numbers), found.apply(Z), equal_nan=True)


@pytest.mark.parametrize(
    "name",
    ["relu(1)", "leaky_relu()", "leaky_relu(1, 2)", "leaky_relu(0.2", "elu(inf)", "elu(x)", "hardtanh(1, 1)",
     "prelu", "leaky_relu(0.2)(0.2)", ""],
)  # fmt: skip
def test_wrong_names(name: str) -> None:
    said = r"one of relu, .*hardtanh, or with numbers leaky_relu\(negative_slope\), elu\(alpha\), hardtanh\("
    with pytest.raises(UsageError, match=said):
        epilogue_of(name, None)


def test_what_is_left_to_torch() -> None:
    numbered, windows = Epilogue("elu(0.5)", 2), Epilogue("relu", MaxPool(3, 2, 1))
    assert numbered.parted(numbers=True, windows=True) == (Epilogue(), numbered)
    assert numbered.parted(numbers=False, windows=True) == (numbered, Epilogue())
    assert windows.parted(numbers=True, windows=True) == (Epilogue("relu"), Epilogue(None, windows.pool))
    assert windows.parted(numbers=True, windows=False) == (windows, Epilogue())


def test_an_epilogue_says_what_it_is() -> None:
    assert str(Epilogue()) == ""
    assert str(Epilogue("relu", 2)) == "relu + 2x2 mean pool"
    assert str(Epilogue(None, MaxPool(3, 2, 1))) == "3x3 max pool"


# --- a new row --------------------------------------------------------------------------------------------


def test_arithmetic_that_differs_from_the_table_is_refused() -> None:
    epilogue.require_arithmetic("toy", set(ACTIVATIONS))
    for names, said in ((set(ACTIVATIONS) - {"silu"}, "'toy'.*: silu"), ({*ACTIVATIONS, "selu"}, ": selu")):
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
    monkeypatch.setitem(ACTIVATIONS, "selu", Activation("selu", "", "", F.selu, nn.SELU))
    with pytest.raises(NotImplementedError, match="differ: selu"):
        run()


# --- the documentation ------------------------------------------------------------------------------------


def documented() -> str:
    """The table of docs/nn.md."""
    lines = ["| `activation=` | computes, of z | derivative | the same module |", "|---|---|---|---|"]
    for row in ACTIVATIONS.values():
        settings = ", ".join(f"{name}={value!r}" for name, value in row.settings.items())
        module = f"`nn.{row.module.__name__}({settings})`"
        name = f'`"{row.name}"`'
        if row.numbers:
            name += f', `"{row.name}({", ".join(row.settings)})"`'
        lines.append(f"| {name} | {row.formula} | {row.derivative} | {module} |")
    return "\n".join(lines)


def test_the_documentation_lists_every_row() -> None:
    page = (Path(__file__).parents[1] / "docs/nn.md").read_text(encoding="utf-8")
    found = page.partition("<!-- activations: begin -->\n")[2].partition("\n<!-- activations: end -->")[0]
    assert found == documented(), f"docs/nn.md wants between its markers:\n{documented()}"
