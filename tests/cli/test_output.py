"""What commands print of names that other people chose: the names, in any terminal, and nothing else."""

import base64
import io
import json
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text

import gammabeta as gb
from gammabeta.cli.app import run
from gammabeta.cli.evaluate import _print_confusions
from gammabeta.cli.output import Screen
from gammabeta.train.plots import confusion, mistakes, save_figure

Call = Callable[..., tuple[int, str, str]]

CLASSES = [b"[v2]", b"$x$", b":heart:", b"\x1b[31mred", b"<img src=x>", b"two\nlines", b"caf\xe9"]
CLASSES += [name.encode() for name in ("日本", "a\u202eb", "x\u200by", "_Ωσ")]
SHOWN = ["[v2]", "$x$", ":heart:", r"\x1b[31mred", "<img src=x>", r"two\nlines", r"caf\udce9"]
SHOWN += ["日本", r"a\u202eb", r"x\u200by", "_Ωσ"]
FOLDER = os.fsdecode(b"[b]a :x: $y$ \x1b[2J caf\xe9")


class Photos:
    """A folder of pictures and a run that learned it, whose names are all of the kind."""

    def __init__(self, folder: Path) -> None:
        self.data, self.run = folder / f"data {FOLDER}", folder / f"run {FOLDER}"
        draw = np.random.default_rng(0)
        for label, name in enumerate(CLASSES):
            place = self.data / os.fsdecode(name)
            place.mkdir(parents=True)
            for number in range(4):
                pixels = (draw.random((16, 16)) * 40 + 18 * label).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")

    @property
    def pictures(self) -> list[Path]:
        return sorted(self.data.glob("*/0.png"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    try:
        found = Photos(tmp_path_factory.mktemp("photos"))
    except OSError:
        pytest.skip("files cannot have such names here")
    options = [
        "-r",
        "fast",
        "--epochs",
        "2",
        "--precision",
        "fp32",
        "--set",
        "batch_size=11",
        "--device",
        "cpu",
    ]
    assert run(["train", str(found.data), "--out", str(found.run), *options]) == 0
    return found


def texts(out: str) -> None:
    assert not [c for c in out if not (c.isprintable() or c == "\n")], out


@pytest.mark.parametrize("command", ["evaluate", "compare", "predict", "doctor", "fold"])
def test_names_are_printed_as_they_are(
    gammabeta: Call, photos: Photos, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {
        "evaluate": ["--out", tmp_path],
        "compare": [photos.run],
        "predict": photos.pictures,
        "doctor": ["--html", tmp_path / "page.html"],
    }
    code, out, err = gammabeta(command, photos.run, *more.get(command, ()))
    assert code == 0
    assert not [line for line in err.splitlines() if not line.startswith("gammabeta: compiling")]
    texts(out)
    if command == "predict":
        assert sorted(line.split("/0.png")[0].split("/")[-1] for line in out.splitlines()) == sorted(SHOWN)
    elif command == "compare":
        assert r"[b]a :x: $y$" in out
    elif command == "evaluate":
        named = [shown for shown in SHOWN if shown in out]
        assert named or "1.0000" in out


def test_an_error_names_a_file_in_one_line(gammabeta: Call, photos: Photos) -> None:
    for arguments in (
        ("evaluate", f"{photos.run}\n[/b]"),
        ("predict", photos.run, photos.data / "[/b]\x1b[31m :x:.png"),
        ("fold", "\x1b[31m[/b]"),
        ("train", photos.data / "\x1b[31m"),
        ("train", "--recipe", "\x1b[31m.toml"),
        ("train", "--set", "\x1b[31m=1"),
        ("\x1b[31m[/b]",),
        ("train", "--\x1b[31m"),
    ):
        code, out, err = gammabeta(*arguments)
        assert (code, err.count("\n")) == (2, 1), arguments
        texts(out + err)
        assert "[" in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "shift_jis", "utf-8"])
def test_any_terminal_can_show_it(
    photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = [
        ["predict", str(photos.run), *map(str, photos.pictures)],
        ["doctor", str(photos.run)],
        ["compare", str(photos.run)],
        ["evaluate", "日本é–"],
        ["--help"],
    ]
    for command in commands:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        code = run(command)
        stream.flush()
        out = raw.getvalue().decode(encoding)
        assert code == (2 if command[0] == "evaluate" else 0), out
        texts(out.replace("\r", ""))
        if command[0] == "predict":
            for shown in SHOWN[:7]:
                assert shown in out
            assert ("日本" in out) == (encoding in ("utf-8", "shift_jis"))
        if command[0] == "doctor":
            assert ("(σ)" in out) == (encoding in ("utf-8", "shift_jis", "cp437"))


def test_tables_are_as_wide_as_what_they_show() -> None:
    file = io.StringIO()
    screen = Screen(file=file, width=60)
    table = Table("[b]x[/b]", ":heart:", box=None)
    table.add_row("\x1b[31mred", Text("\x1b[1m"))
    table.add_row("[/b]", "日本")
    screen.print(table)
    screen.print(Text("a\nb\x1b[2J"), Path("[i]x"), "two\nlines")
    head, first, second, *rest = file.getvalue().splitlines()
    assert head.split() == ["[b]x[/b]", ":heart:"]
    assert first.split() == [r"\x1b[31mred", r"\x1b[1m"]
    assert first.index(r"\x1b[1m") == head.index(":heart:") == second.index("日本")
    assert rest == ["a", r"b\x1b[2J [i]x two\nlines"]


def test_no_cell_is_cut_where_a_name_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    names = ["עברית\u202e日本", "x"]
    _print_confusions(SimpleNamespace(confusion=torch.tensor([[0, 3], [0, 0]])), names)
    layers = OrderedDict({names[0]: torch.nn.BatchNorm1d(3)})
    Screen(file=sys.stdout, width=200).print(gb.diagnose(torch.nn.Sequential(layers), [torch.randn(9, 3)]))
    sys.stdout.flush()
    shown = re.sub(r"\s", "", raw.getvalue().decode("ascii"))
    escaped = names[0].encode("unicode_escape").decode("ascii")
    table = shown[shown.index("layerkind") :]  # below the findings, which name it too
    assert escaped in shown[: shown.index("layerkind")]
    assert escaped + "BatchNorm1d" in table


def test_doctor_says_which_file_it_wrote(
    gammabeta: Call, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mended [b]x.safetensors"
    options = ("--fix", "recalibrate", "--out", out, "--samples", "64")
    code, text, _ = gammabeta("doctor", trained_run, *options)
    assert code in (0, 1)
    assert f"Mended weights: {out}" in text
    assert out.is_file()


def test_pages_and_weights_that_cannot_be_written(gammabeta: Call, trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "w.pt").mkdir()
    for command in (
        ("doctor", trained_run, "--samples", "64", "--html", tmp_path),
        ("recalibrate", trained_run, "--samples", "64", "--out", tmp_path / "w.pt"),
    ):
        code, _, err = gammabeta(*command)
        assert (code, err.count("error")) == (2, 1)
        assert "is a folder" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB.")]
)
def test_memory_that_runs_out_is_one_line(
    gammabeta: Call, trained_run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def allocate(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(torch.nn.Module, "__call__", allocate)
    for command in ("evaluate", "doctor", "recalibrate"):
        more = ("--out", trained_run / "none.pt") if command == "recalibrate" else ()
        code, _, err = gammabeta(command, trained_run, *more)
        assert (code, err.count("\n")) == (2, 1)
        assert "out of memory" in err


@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["--help"], ["--version"]])
@pytest.mark.parametrize("place", ["closed pipe", "/dev/full"])
def test_an_output_that_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, place: str, command: list[str]
) -> None:
    if place == "/dev/full" and not Path(place).exists():
        pytest.skip("there is no full device here")
    if place == "closed pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(place, os.O_WRONLY)
    errors = io.StringIO()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", errors)
        code = run(command)
    found = errors.getvalue()
    if place == "closed pipe":
        assert (code, found) == (0, "")
    else:
        assert (code, found) == (
            2,
            "gammabeta: error: the output cannot be written: No space left on device\n",
        )


def test_other_bugs_keep_their_traceback(gammabeta: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("bug")

    monkeypatch.setattr("gammabeta.train.provenance.machine", broken)
    with pytest.raises(KeyError):
        gammabeta("info")


NASTY_LAYERS = (
    "[red]x[/red] $a$ <img src=x onerror=alert(1)>",
    "\x1b[31mnew\nline",
    "_日\u202e\udce9",
    "a" * 500,
)


class Nasty(torch.nn.Module):
    """Layers whose names are markup somewhere."""

    def __init__(self) -> None:
        super().__init__()
        for name in NASTY_LAYERS:
            self.add_module(name, torch.nn.BatchNorm2d(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def test_layer_names_stay_text_in_every_form_of_a_report(tmp_path: Path) -> None:
    """In the terminal's text, the page and its pictures, the table of folding."""
    batches = [torch.randn(8, 3, 4, 4) * 3 + 5 for _ in range(2)]
    report = gb.diagnose(Nasty(), batches)
    assert {finding.layer for finding in report} >= set(NASTY_LAYERS)
    page = report.save_html(tmp_path / "page.html").read_text("utf-8")
    tags = set(re.findall(r"<img [^>]*", page))
    assert len(tags) == 2
    assert all("src='data:image/svg" in tag for tag in tags)
    assert r"\x1b[31mnew\nline" in page
    for picture in re.findall(r"base64,([\w+/=]+)", page):
        texts(base64.b64decode(picture).decode())
    texts(page)
    texts(str(report))
    assert NASTY_LAYERS[0] in str(report)
    assert json.loads(report.to_json())["findings"]
    folded = gb.fold(Nasty().eval(), batches[0])
    texts(folded.fold_report.table())
    assert len(folded.fold_report.table().splitlines()) == len(NASTY_LAYERS) + 2


def test_pictures_of_long_names(tmp_path: Path) -> None:
    names = ["a" * 100_000, "[b]" * 40, "日本" * 30, "\x1b" * 50]
    counts = np.full((4, 4), 2)
    save_figure(confusion(counts, names, "t" * 1000), tmp_path / "confusion.png")
    images = np.zeros((4, 1, 8, 8), np.uint8)
    save_figure(mistakes(images, names, names, [0.5] * 4, "title $"), tmp_path / "mistakes.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert max(picture.size) < 2000


def test_no_figure_of_a_table_is_cut_where_the_terminal_is_narrow() -> None:
    table = Table("class", "images", "correct", "accuracy")
    table.add_row("seven", "1,028", "1,015", "0.9874")
    written = io.StringIO()
    Screen(file=written, width=20).print(table)
    lines = [line.strip("│┃").split("│") for line in written.getvalue().splitlines() if line.startswith("│")]
    columns = ["".join(cell.strip() for cell in cells) for cells in zip(*lines, strict=True)]
    assert columns == ["seven", "1,028", "1,015", "0.9874"]


def test_a_file_gets_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("run", "accuracy")
    table.add_row("a name " * 30, "0.9874")
    written = io.StringIO()
    Screen(file=written).print(table)
    assert "a name " * 29 in written.getvalue()
