"""A run folder's documents, damaged by hand: refused in one line or read with a note, never a wrong answer.

Each document is one row of a table: a file, what is done to it, and the words of the refusal, or None where
the run is still good. Every row goes to the reader, and some to the commands that read such a file.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gammabeta.cli.app import run as command_line
from gammabeta.data import Dataset
from gammabeta.errors import GammabetaError, GammabetaWarning
from gammabeta.jsontext import to_json
from gammabeta.train import Run, TrainingInterrupted, load_model, load_recipe
from gammabeta.train.checkpoint import Checkpoints, _digest
from gammabeta.train.fitting import Observer
from gammabeta.train.page import Shown, page
from gammabeta.train.resume import Resumption
from gammabeta.train.run import Job, default_path
from gammabeta.train.session import train_run

NAN, INF = float("nan"), float("inf")
DEEP = 5000
Damage = Callable[[Path], None]


class StopAt(Observer):
    def stop_requested(self) -> bool:
        return True


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """Return a run that was interrupted, its data beside it."""
    folder = tmp_path_factory.mktemp("documents")
    arrays = {"x_train": digits.train.images[:, 0], "y_train": digits.train.labels}
    np.savez(folder / "digits.npz", **arrays, x_test=digits.test.images[:, 0], y_test=digits.test.labels)
    recipe = load_recipe("fast", {"precision": "fp32", "recalibrate": 64, "batch_size": 64})
    job = Job(str(folder / "digits.npz"), recipe, device="cpu")
    with pytest.raises(TrainingInterrupted):
        train_run(digits, job, folder / "run", StopAt())
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "runs" / "run"))


def write(name: str, content: bytes | str) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda run: (run / name).write_bytes(data) and None


def put(place: str, value: Any) -> Damage:
    """Put a value into run.json; ``place`` is the way to it."""

    def damage(run: Path) -> None:
        document = json.loads((run / "run.json").read_text("utf-8"))
        *way, last = place.split(".")
        inner = document
        for key in way:
            inner = inner[key]
        inner[last] = value
        (run / "run.json").write_text(json.dumps(document), "utf-8")

    return damage


def drop(place: str) -> Damage:
    def damage(run: Path) -> None:
        document = json.loads((run / "run.json").read_text("utf-8"))
        *way, last = place.split(".")
        inner = document
        for key in way:
            inner = inner[key]
        del inner[last]
        (run / "run.json").write_text(json.dumps(document), "utf-8")

    return damage


def line(field: str, text: str) -> Damage:
    """Put a text in place of a field's value in recipe.toml."""

    def damage(run: Path) -> None:
        path = run / "recipe.toml"
        lines = path.read_text("utf-8").splitlines()
        changed = [f"{field} = {text}" if each.startswith(f"{field} ") else each for each in lines]
        assert changed != lines
        path.write_text("\n".join(changed) + "\n", "utf-8")

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(run: Path) -> None:
        path = run / "model.safetensors"
        save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)

    return damage


def one(name: str, tensor: torch.Tensor) -> Damage:
    return weights(lambda tensors: tensors | {name: tensor})


JSON = [
    *[
        (write("run.json", content), words)
        for content, words in (
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"\xff\xfe{}", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ('{"a":' * 60 + "1" + "}" * 60, "not valid JSON"),
            ('{"seed": ' + "9" * DEEP + "}", "not valid JSON"),
            ("[]", "damaged"),
            ("null", "damaged"),
            ("3", "damaged"),
            ('"run"', "damaged"),
            ("{}", "damaged: status"),
            ('{"format": 0}', "damaged: format"),
            ('{"format": 2}', "later version of gammabeta: update"),
            ('{"format": "1"}', "damaged: format"),
        )
    ],
    *[
        (put(place, value), f"damaged: {place}")
        for place, values in {
            "status": ["", "done", None, 3, ["finished"]],
            "created": [None, 5, "x" * 5000],
            "seed": [-1, 1.5, True, "0", 2**63, 10**400, None, NAN],
            "device": [None, 0, ["cpu"]],
            "precision": ["fp16", 32, None],
            "data": [None, 7, "a\0b", "x" * 100_000, "\ud800"],
            "data_sha256": ["", "z" * 64, 5],
            "holdout": [-1, 0.5, "9", 2**70],
            "provenance": [None, 3, []],
            "provenance.machine": [4, "fast", []],
            "provenance.machine.threads": ["2", -1, NAN, 1e9],
            "provenance.versions": [5, {"torch": 2}],
            "network": [None, [], 7],
            "network.channels": [0, -1, 1.5, "1", 10**9],
            "network.height": [0, -28, 1e300, 10**9, None],
            "network.width": [True, [28]],
            "network.classes": [[], ["0"], "0123456789", [0, 1], None, {"0": 1}, ["x" * 100_000, "y"]],
            "network.batch_norm": [None, 1, "yes"],
            "network.eps": [0, -1e-5, 1e308, NAN, INF, "1e-5"],
            "result": [3, [], {}],
            "init": ["run", {}, {"run": "a", "sha256": "b"}],
            "extended": [3, [4], [{"step": -1, "epochs": 1.0}]],
            "failure": [3],
        }.items()
        for value in values
    ],
    *[
        (put(f"network.{name}", value), "damaged: network")
        for name in ("pixel_mean", "pixel_scale")
        for value in ([], [1.0, 2.0], [NAN], [INF], [None], ["1"], 5, [1e300])
    ],
    (put("network.pixel_scale", [0.0]), "damaged: network.pixel_scale"),
    (put("network.pixel_scale", [-1.0]), "damaged: network.pixel_scale"),
    *[(drop(name), f"damaged: {name}") for name in ("status", "seed", "network", "network.classes", "data")],
    *[
        (drop(name), None)
        for name in ("created", "finished", "data_sha256", "holdout", "provenance", "network.eps", "result")
    ],
    (put("network.eps", 1), None),
    (put("provenance.machine.cooling", {"fans": [1, 2]}), None),
    (put("colour", "red"), None),
    (put("network.depth", [3]), None),
    (put("network.height", 30), "the preparation is of another input"),
    (
        lambda run: (put("network.height", 30)(run), put("network.preparation", None)(run)),
        "is \\(128, 800\\) where",
    ),
    (put("network.preparation", [1]), "network.preparation: input should be"),
    (put("network.preparation.box", "wide"), "network.preparation: box: input should be"),
    (put("network.preparation.height", "28"), "network.preparation: height: input should be a valid integer"),
    (put("holdout_rule", "none"), "holdout_rule: input should be"),
    (put("skip_damaged", 1), "skip_damaged: input should be"),
    (put("data_path", "a\0b"), "data_path: a path cannot hold"),
    (put("network.classes", list("abc")), "fc2.weight is"),
    (put("network.hidden_bias", True), "lacks conv1.bias"),
    (put("network.batch_norm", False), "lacks conv1.bias|has bn1"),
]

RECIPES = [
    *[
        (write("recipe.toml", content), words)
        for content, words in (
            (b"", "field required"),
            (b"\xff\xfe", "not UTF-8"),
            ("a = " + "[" * DEEP, "nested too deeply"),
            ("a = " + "[" * DEEP + "]" * DEEP, "nested too deeply"),
            ("epochs = " + "9" * DEEP, "not valid TOML"),
            ("epochs =", "not valid TOML"),
            ("x" * (2 << 20), "larger than any"),
            ('base = "fast"', "field required"),
            ("a.b.c.d = 1\n[a]\n", "not valid TOML"),
        )
    ],
    *[
        (line(field, value), f"damaged: {field}")
        for field, values in {
            "name": ["3", '"a\\u0000b"', '"a\\u001b[31mb"', f'"{"x" * 100_000}"', '"a\\nb"'],
            "epochs": ['"3"', "0", "-1.0", "nan", "inf", "1e300", "true", "[1]"],
            "batch_size": ["1", "2.5", "0", "true", "99999999999999999999"],
            "learning_rate": ["0.0", "-0.1", "inf", "nan", '"high"', "1e300"],
            "warmup": ["2.0", "-0.5"],
            "schedule": ['"spiral"', "1"],
            "momentum": ["1.0", "nan"],
            "nesterov": ["1", '"yes"'],
            "batch_norm_eps": ["0.0", "1e308", "-1e-5"],
            "recalibrate": ["-1", "1e3", "99999999999999999999"],
            "shift": ["-1", "100000"],
            "precision": ['"fp64"'],
        }.items()
        for value in values
    ],
    (line("name", '"../../outside"'), None),
    (line("name", '"a recipe with spaces, and γ"'), None),
    (line("flip", "false\nmixup = 0.5"), None),
]

WEIGHTS = [
    *[
        (
            weights(
                lambda tensors, kind=kind: {
                    k: v.to(kind) if v.is_floating_point() else v for k, v in tensors.items()
                }
            ),
            words,
        )
        for kind, words in (
            (torch.float16, None),
            (torch.bfloat16, None),
            (torch.float64, None),
            (torch.int64, "is int64 where float32"),
            (torch.uint8, "is uint8 where float32"),
            (torch.bool, "is bool where float32"),
        )
    ],
    (one("fc2.bias", torch.full((10,), NAN)), "not finite in fc2.bias"),
    (one("conv1.weight", torch.full((20, 1, 3, 3), INF)), "not finite in conv1.weight"),
    (one("fc2.bias", torch.full((10,), 1e300, dtype=torch.float64)), "not finite in fc2.bias"),
    (one("bn1.running_var", torch.full((20,), -1.0)), "negative variances in bn1.running_var"),
    (one("bn1.num_batches_tracked", torch.tensor(3.0)), "float32 where int64"),
    (one("bn1.num_batches_tracked", torch.tensor(3, dtype=torch.int32)), None),
    (one("fc2.bias", torch.zeros(11)), "fc2.bias is \\(11,\\)"),
    (one("fc2.bias", torch.zeros(())), "fc2.bias is \\(\\)"),
    (one("more", torch.zeros(3)), "has more"),
    (weights(lambda tensors: {}), "lacks"),
    (weights(lambda tensors: {k: v for k, v in tensors.items() if k != "bn2.weight"}), "lacks bn2.weight"),
    *[
        (write("model.safetensors", content), "not a readable")
        for content in (b"", b"\0" * 8, b"\xff" * 64, b"{}")
    ],
]

PROGRESS = {"kind": "progress", "step": 1, "epochs": 0.1, "images": 64, "loss": 2.0, "accuracy": 0.1}
PROGRESS |= {"learning_rate": 0.1, "seconds": 0.1}
LAYER = {"mean": 0.0, "var": 1.0, "mean_distance": None, "var_distance": 0.1, "percentiles": [-1.0, 0.0, 1.0]}
STATISTICS = {"kind": "statistics", "step": 1, "epochs": 0.1, "layers": {"bn1": LAYER}}
EVALUATION = {"kind": "evaluation", "step": 1, "epochs": 0.1, "epoch": 0, "split": "test", "accuracy": 0.5}
EVALUATION |= {"loss": 1.0, "correct": 5, "count": 10, "seconds": 0.1}


def a_folder(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


METRICS = [
    *[
        write("metrics.jsonl", content)
        for content in (
            b"",
            b"{}\n",
            b'[]\n3\nnull\n"x"\n',
            b"\xff\xfe\n\n\n",
            b"[" * 100_000 + b"\n",
            b'{"kind": 3}\n{"kind": []}\n{"kind": null}\n',
            b'{"kind": "progress"}\n',
            b'{"kind": "statistics", "step": 1, "epochs": 1, "layers": {}}\n',
            b'{"kind": "evaluation", "step": 1}\n',
            b'{"kind": "of a later version", "step": 3, "colour": "red"}\n',
            b'{"kind": "progress", "step": ' + b"9" * DEEP + b"}\n",
        )
    ],
    *[
        write("metrics.jsonl", f"{to_json(PROGRESS)}\n{json.dumps(row)}\n{to_json(EVALUATION)}\n")
        for row in (
            *[PROGRESS | {"loss": value} for value in (NAN, INF, None, -1.0, "2", 1e308, 10**400, [])],
            *[PROGRESS | {"epochs": value} for value in (NAN, 1e308, "1", -1, None)],
            *[EVALUATION | {"accuracy": value} for value in (NAN, None, 2.0, "half", {})],
            *[EVALUATION | {"count": value} for value in (-1, 1.5, None, 10**30)],
            STATISTICS,
            *[
                STATISTICS | {"layers": value}
                for value in ([], 3, {"bn1": 3}, {"bn1": {}}, {"a": LAYER, "b": LAYER})
            ],
            *[
                STATISTICS | {"layers": {"bn1": LAYER | {"percentiles": p}}}
                for p in ([], [1, 2], [NAN] * 3, "abc")
            ],
            STATISTICS | {"layers": {"bn1": LAYER | {"mean": NAN, "var": 1e38}}},
        )
    ],
    lambda run: (run / "metrics.jsonl").unlink(),
    a_folder,
]


def values(**changes: Any) -> Damage:
    """Change the plain values of the checkpoint, its checksum made right again."""

    def damage(run: Path) -> None:
        checkpoints = Checkpoints(run)
        state, _ = checkpoints.load()
        assert state is not None
        state.values.update(changes)
        changed = {key: value for key, value in state.values.items() if value is not ...}
        state.values.clear()
        state.values.update(changed)
        step = checkpoints.steps()[-1]
        if changed.get("step") == step:
            checkpoints.save(state)
            return
        checkpoints.save(type(state)(state.tensors, changed | {"step": step}))
        path = run / "checkpoints" / f"step-{step}.json"
        document = json.loads(path.read_text("utf-8"))
        document["values"] = changed
        document.pop("sha256")
        path.write_text(json.dumps(document | {"sha256": _digest(document)}), "utf-8")

    return damage


def tensors(**changes: torch.Tensor | None) -> Damage:
    """Change the tensors of the checkpoint, its checksums made right again."""

    def damage(run: Path) -> None:
        checkpoints = Checkpoints(run)
        state, _ = checkpoints.load()
        assert state is not None
        for name, tensor in changes.items():
            state.tensors.pop(name, None)
            if tensor is not None:
                state.tensors[name] = tensor
        checkpoints.save(state)

    return damage


MOMENTUM = "optimizer.momentum_buffer.fc2.bias"
CHECKPOINTS = [
    *[
        values(**{field: value})
        for field, several in {
            "step": [-1, 2, "1", 1.5, None, 10**30, ...],
            "images": [-1, "64", None, ...],
            "loss": ["2", [], -1.0],
            "accuracy": [2.0, "x"],
            "seconds": [-1.0, "1", None, ...],
            "metrics_bytes": [-1, 1.5, ...],
            "best_loss": ["1", []],
            "judged": ["no", 3],
            "recipe": [3, []],
            "seed": [-1, "0"],
        }.items()
        for value in several
    ],
    tensors(**{"model.fc2.bias": None}),
    tensors(**{"model.fc2.bias": torch.zeros(11)}),
    tensors(**{"model.fc2.bias": torch.full((10,), NAN)}),
    tensors(**{"model.more": torch.zeros(1)}),
    tensors(**{MOMENTUM: torch.zeros(3)}),
    tensors(**{MOMENTUM: torch.zeros(10, dtype=torch.int64)}),
    tensors(**{MOMENTUM: torch.full((10,), INF)}),
    tensors(**{"optimizer.momentum_buffer.nothing": torch.zeros(3)}),
    tensors(**{"random.cpu": torch.zeros(3, dtype=torch.uint8)}),
    tensors(**{"random.cpu": torch.zeros(5056)}),
    lambda run: [file.write_bytes(b"{}") for file in (run / "checkpoints").glob("*.json")] and None,
    lambda run: [file.write_bytes(b"[[]]") for file in (run / "checkpoints").glob("*.json")] and None,
]

READ = [*JSON, *RECIPES, *WEIGHTS]


def few(count: int, each: int) -> list[object]:
    """So many numbers, of which the default run takes one in ``each``."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n % each > 0)) for n in range(count)]


def test_there_are_more_than_a_hundred() -> None:
    assert len(READ) + len(METRICS) + len(CHECKPOINTS) > 250


@pytest.mark.parametrize("number", range(len(READ)))
def test_what_is_read_whole_is_refused_or_right(run: Path, digits: Dataset, number: int) -> None:
    damage, words = READ[number]
    pictures = digits.test.images[:20]
    expected = load_model(run, "cpu").probabilities(pictures)
    damage(run)
    if words is not None:
        with pytest.raises(GammabetaError, match=words) as caught:
            load_model(run, "cpu")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GammabetaWarning)
        found = load_model(run, "cpu").probabilities(pictures)
    assert found.isfinite().all()
    assert found.shape == expected.shape


@pytest.mark.parametrize("number", few(len(METRICS), 4))
def test_metrics_that_cannot_be_read_are_left_out(run: Path, number: int) -> None:
    METRICS[number](run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GammabetaWarning)
        rows = Run.open(run).metrics()
        assert all(isinstance(row["kind"], str) for row in rows)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert page([Shown(Run.open(run))])
    assert all(each.category is GammabetaWarning for each in told), told


@pytest.mark.parametrize("number", range(len(CHECKPOINTS)))
def test_checkpoints_that_cannot_be_right_are_passed_over(run: Path, number: int) -> None:
    CHECKPOINTS[number](run)
    resumed = Resumption.of(run)
    assert resumed.state is None
    assert any("is damaged and passed over" in message for message in resumed.messages)


def outside(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "runs" not in path.parts[len(folder.parts) :]}


SAMPLES = [
    *[("evaluate", *READ[number]) for number in range(3, len(READ), 25)],
    *[("doctor", *READ[number]) for number in range(9, len(READ), 60)],
    *[("fold", *READ[number]) for number in range(17, len(READ), 60)],
    *[("compare", damage, None) for damage in METRICS[::6]],
    *[("resume", damage, None) for damage in (*METRICS[4::8], *CHECKPOINTS[::7])],
    *[("resume", *READ[number]) for number in range(5, len(READ), 40)],
]


@pytest.mark.parametrize("number", few(len(SAMPLES), 3))
def test_each_by_its_command(run: Path, tmp_path: Path, monkeypatch, capsys, number: int) -> None:
    command, damage, words = SAMPLES[number]
    damage(run)
    monkeypatch.chdir(tmp_path)
    before = outside(tmp_path)
    arguments = {
        "evaluate": ["evaluate", "runs/run"],
        "doctor": ["doctor", "runs/run", "--samples", "64"],
        "fold": ["fold", "runs/run"],
        "compare": ["compare", "runs/run", "runs/run", "--out", "runs/both.png"],
        "resume": ["train", "--resume", "runs/run", "--device", "cpu"],
    }[command]
    code = command_line(arguments)
    captured = capsys.readouterr()
    notes = [line for line in captured.err.splitlines() if line.startswith("gammabeta: note: ")]
    errors = [line for line in captured.err.splitlines() if line not in notes]
    assert "Traceback" not in captured.out + captured.err
    assert "nan" not in captured.out.lower()
    assert outside(tmp_path) == before
    if words is not None and command != "resume":
        assert (code, len(errors)) == (2, 1), captured.err
    assert code in (0, 1, 2)
    assert len(errors) <= 1, captured.err


@pytest.mark.parametrize(
    "name", ["../../outside", "/tmp/x", "..", "a/b\\c", "x" * 100_000, "\x1b[31m", "", "γ" * 300]
)
def test_a_run_is_made_inside_runs_whatever_its_recipe_is_called(name: str) -> None:
    for path in (default_path(name, "digits.npz"), default_path("fast", name)):
        assert path.parent == Path("runs")
        assert path.resolve().parent == Path("runs").resolve()
        assert path.name.isprintable()
        assert len(path.name.encode()) < 255


def test_recipes_that_build_on_too_many(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"{number}.toml").write_text(f'base = "{tmp_path}/{number + 1}.toml"\n', "utf-8")
    with pytest.raises(GammabetaError, match="builds on more than 20"):
        load_recipe(tmp_path / "0.toml")
    (tmp_path / "number.toml").write_text("base = 3\n", "utf-8")
    with pytest.raises(GammabetaError, match="base is not a name"):
        load_recipe(tmp_path / "number.toml")
    with pytest.raises(GammabetaError, match="null character"):
        load_recipe("a\0b.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(GammabetaError, match="not a file"):
        load_recipe(tmp_path / "folder.toml")
