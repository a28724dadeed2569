"""The benchmark suite ``gpu``: its counting, checks and words, without a GPU; a quick run with one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import IncorrectError, Options, command
from benchmarks.run import parse
from benchmarks.suites import gpu, gpu_layers, gpu_models, gpu_timing


def small(operation="BN+add+ReLU", dtype=torch.float32, channels_last=True):
    return gpu_layers.Case(operation, "test", (4, 6, 8, 8), channels_last, dtype)


def test_fewest_bytes():
    """x in and out; grad, x in and dx out; a residual in twice and its gradient out."""
    plain, added = small("BN+ReLU"), small("BN+add+ReLU", torch.bfloat16)
    assert plain.nbytes == 4 * 6 * 64 * 4
    assert [gpu_layers.fewest_bytes(plain, part) for part in ("forward", "backward", "step")] == [
        n * plain.nbytes for n in (2, 3, 5)
    ]
    assert [gpu_layers.fewest_bytes(added, part) for part in ("forward", "backward", "step")] == [
        n * added.nbytes for n in (3, 5, 8)
    ]


def test_rotation_outgrows_the_cache():
    assert gpu_timing.rotations(10 << 20, 50 << 20) * (10 << 20) >= 4 * (50 << 20)
    assert gpu_timing.rotations(1 << 30, 50 << 20) == 2
    assert gpu_timing.rotations(1, 50 << 20) == 32


def test_cases_are_those_promised():
    found = gpu_layers.cases(quick=False)
    assert {c.operation for c in found} == {"BN", "BN+ReLU", "BN+add+ReLU"}
    assert {c.dtype for c in found} == {torch.float32, torch.bfloat16}
    stages = {c.shape for c in found if c.name == "ResNet-50"}
    assert len(stages) == 10
    assert {s[0] for s in stages} == {64, 256}
    assert any(len(c.shape) == 5 for c in found)
    assert any(len(c.shape) == 2 for c in found)
    assert all(any(c.shape == s and c.channels_last for c in found) for s in stages)
    assert 0 < len(gpu_layers.cases(quick=True)) < len(found) / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_lets_right_programs_pass_only(dtype, device):
    layer = gpu_layers.Layer(small(dtype=dtype), torch.device(device))
    eager = gpu_layers.torch_program(layer.case, inplace=True)
    gpu_layers.check(layer, gpu_layers.our_program(layer.case), eager)
    gpu_layers.check(layer, gpu_layers.torch_program(layer.case, inplace=False), eager)

    def wrong(x, residual, mean, var, weight, bias):
        return eager(x, residual, mean, var, weight, bias) * 1.02

    with pytest.raises(IncorrectError, match="is off by"):
        gpu_layers.check(layer, wrong, eager)


def test_a_row_without_a_clock(monkeypatch, device):
    """All programs of a case run; the clock alone is made up."""
    ran = {}

    def interleave(programs, rounds, graphs):
        for name, calls in programs.items():
            for call in calls:
                call()
            ran[name, graphs] = len(calls)
        return {"ours": 1.0, "eager": 2.0, "compiled": 1.5, "forward": 0.4, "backward": 0.6}

    monkeypatch.setattr(gpu, "interleave", interleave)
    monkeypatch.setattr(torch, "compile", lambda program, dynamic: program)
    case = small("BN+ReLU")
    row = gpu.measure(case, torch.device(device), 1e9, 1 << 10, 3)
    assert set(ran) == {(n, g) for n in ("ours", "eager", "compiled") for g in (True, False)} | {
        ("forward", True),
        ("backward", True),
    }
    assert row["eager / ours"] == 2.0
    assert row["of copy"] == pytest.approx(5 * case.nbytes / 1e-3 / 1e9)
    assert row["forward of copy"] == pytest.approx(2 * case.nbytes / 0.4e-3 / 1e9)
    said = gpu.summarise([row, row | {"MB": 100.0, "of copy": 0.5}])
    assert said["BN+ReLU"] == "eager / ours 2.00× (least 2.00×), compiled / ours 1.50× (least 1.50×)"
    assert said["above 64 MiB, of copy"] == "mean 50 %, least 50 %"


def test_parts_are_chosen_and_rows_told(monkeypatch, capsys):
    """The parts asked for run, no other; a row is on standard error before the next is measured."""
    called = []
    properties = SimpleNamespace(name="A card", L2_cache_size=1 << 20)
    monkeypatch.setattr(gpu, "gpu_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device, rounds: 3e12)
    rates = {"eager / ours": 2.0, "compiled / ours": 1.0}
    monkeypatch.setattr(
        gpu, "measure", lambda case, *_: {"case": case.title, "operation": case.operation, "MB": 1.0, **rates}
    )
    for part in ("resnet_step", "digits"):
        monkeypatch.setattr(gpu, part, lambda *_, part=part: called.append(part) or {part: "ran"})
    layers = parse("gpu", ["--part", "layers", "--case", "BN+ReLU · ResNet-50 64×512"])
    result = gpu.run(layers)
    assert called == []
    assert len(result.rows) == 4, "two layouts, two dtypes"
    assert [json.loads(line)["case"] for line in capsys.readouterr().err.splitlines()] == [
        row["case"] for row in result.rows
    ]
    assert result.summary["device copy"] == "3000 GB/s, read and written"
    assert result.machine == "A card"
    whole = gpu.run(Options(quick=True))
    assert called == ["resnet_step", "digits"]
    assert len(whole.rows) == len(gpu_layers.cases(quick=True))


def test_resnet_is_converted_whole():
    """Every batch norm becomes ours, with the addition and the ReLU after it, and the step still learns."""
    from gammabeta.conversion.convert import convert

    torch.manual_seed(0)
    model = gpu_models.resnet50((1, 1, 1, 1), 8, 10)
    report = str(convert(model, to="fused").conversion_report)
    assert report.count("residual + relu") == 4
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in gpu_models.resnet50().modules()) == 53
    assert sum(p.numel() for p in gpu_models.resnet50().parameters()) == 25_557_032, "ResNet-50's own number"
    step = gpu_models.training_step(model, torch.randn(4, 3, 32, 32), torch.arange(4))
    losses = [float(step()) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_the_digits_section(monkeypatch):
    """It reads what ``gammabeta train --json`` prints, drops the warm-up, and names missing packages."""
    seen = []

    def train(arguments, _):
        seen.append(arguments)
        result = {
            "seconds": {"train": len(seen), "recalibrate": 0.5},
            "test_accuracy": 0.985 + len(seen) / 500,
        }
        return command.Run(result, 5.0, 600.0)

    monkeypatch.setattr(command, "train", train)
    found = gpu_models.digits(3)
    assert len(seen) == 4
    assert "--recipe fast --device cuda --seed" in " ".join(seen[0])
    assert found["digit network, seconds of training"] == "median 3.50, most 4.50"
    assert found["digit network, test accuracy"] == "median 0.9910, 3 of 3 seeds reach 0.989"
    monkeypatch.setattr(gpu_models, "find_spec", lambda name: None if name == "pydantic" else object())
    assert "pydantic not installed" in gpu_models.digits(3)["digit network"]


def test_it_loads_with_torch_and_triton_alone():
    """A bare GPU machine has neither Numba nor what the command line needs."""
    absent = (
        "numba",
        "pydantic",
        "rich",
        "typer",
        "safetensors",
        "matplotlib",
        "PIL",
        "platformdirs",
        "pooch",
    )
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport benchmarks.suites.gpu"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_without_a_gpu_it_says_so_in_one_line():
    program = Path(__file__).parents[3] / "benchmarks" / "run.py"
    done = subprocess.run([sys.executable, program, "gpu"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: the gpu suite needs an NVIDIA GPU, and this PyTorch ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # the compiler's advice is not ours to follow here
def test_a_quick_run(tmp_path):
    result = gpu.run(Options(quick=True, out=tmp_path))
    assert all(row["ours ms"] > 0 for row in result.rows)
