"""``gammabeta reproduce``: the list, a study's files, one-line errors; every study runs."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from gammabeta.cli.app import run
from gammabeta.studies import CATALOG, conduct, find, jobs
from gammabeta.studies.report import read, section

CHEAP = ("gradient-explosion", "weight-decay")


def check(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a study with --quick and two seeds; look at everything it writes."""
    assert run(["reproduce", name, "--quick", "--seeds", "2", "--out", str(folder), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["studies"]
    study, document = find(name), read(folder, name)
    assert document is not None
    assert told["verdict"] == document["verdict"]
    assert document["quick"]
    assert document["versions"]["torch"]
    assert document["machine"]["processor"]
    assert [seed["seed"] for seed in document["seeds"]] == [0, 1]
    for seed in document["seeds"]:
        assert set(study.numbers) <= set(seed["numbers"])
    page = (folder / f"{name}.md").read_text("utf-8")
    assert document["verdict"] in page
    assert study.claim in page
    for criterion in study.criteria:
        assert criterion.says in page
    assert section(study, document, "") in page
    for look in ("light", "dark"):
        ElementTree.parse(folder / f"{name}-{look}.svg")
        with Image.open(folder / f"{name}-{look}.png") as picture:
            corner = picture.convert("L").getpixel((2, 2))
        assert isinstance(corner, int)
        assert (corner > 200) == (look == "light")
    assert {Path(path).name for path in told["files"]} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", CHEAP)
def test_the_cheapest(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(name, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in CATALOG if name not in CHEAP])
def test_every_study(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(name, tmp_path, capsys)


@pytest.mark.slow
def test_processes_measure_what_one_process_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = []
    for count in ("1", "2"):
        out = tmp_path / count
        assert (
            run(
                ["reproduce", *CHEAP, "--quick", "--seeds", "2", "--jobs", count, "--out", str(out), "--json"]
            )
            == 0
        )
        told = json.loads(capsys.readouterr().out)["studies"]
        assert {each["study"] for each in told} == set(CHEAP)
        documents = [read(out, name) for name in CHEAP]
        numbers.append([seed["numbers"] for document in documents if document for seed in document["seeds"]])
    for one, other in zip(*numbers, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_what_is_done_is_kept_if_the_rest_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conduct.measure

    def measure(piece: conduct.Piece, told: conduct.Told | None = None) -> dict[str, object]:
        if piece.study == CHEAP[1]:
            raise KeyboardInterrupt
        return real(piece, told)

    monkeypatch.setattr(jobs, "measure", measure)
    assert run(["reproduce", *CHEAP, "--quick", "--seeds", "1", "--out", str(tmp_path)]) != 0
    assert f"{CHEAP[0]}: " in capsys.readouterr().out
    assert read(tmp_path, CHEAP[0]) is not None
    assert read(tmp_path, CHEAP[1]) is None


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOG)
    assert all(len(line.rstrip()) <= 80 for line in lines)


def test_errors_are_one_line_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    for arguments, message in (
        (["gradient-explosion", "nonsense"], "there is no study 'nonsense'"),
        (["gradient-explosion", "--out", str(taken / "folder")], "cannot make the folder"),
        (["gradient-explosion", "domains", "--data", str(tmp_path / "none")], "no such data set or path"),
        (["gradient-explosion", "--seeds", "0"], "reproduce --help`"),
    ):
        assert run(["reproduce", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out.strip()
