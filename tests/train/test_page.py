"""The page of a run: all in one file, nothing fetched, names are text, and never worth a training."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gammabeta import data, train
from gammabeta.data import Dataset, Split
from gammabeta.errors import GammabetaWarning
from gammabeta.train import page
from gammabeta.train.fitting import Observer, Outcome
from gammabeta.train.judge import evaluate, shown
from gammabeta.train.load import load_model
from gammabeta.train.run import Job, Run
from gammabeta.train.session import train_run

NAMES = ("<script>alert(1)</script>", "b&b\x1b[31m", "日本")


class Parsed(HTMLParser):
    """What a page holds and asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Parsed:
    found = Parsed()
    found.feed(text)
    assert found.open == []
    assert not {"script", "link", "iframe", "object"} & found.tags
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert not re.search(r"@import|url\(|https?:", text)
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("page") / "shades.npz"
    labels = np.arange(120) % 3
    images = (60 * labels[:, None, None] + generator.integers(0, 120, (120, 16, 16))).astype(np.uint8)
    np.savez(path, x_train=images[:90], y_train=labels[:90], x_test=images[90:], y_test=labels[90:])
    loaded = data.load(path)
    return Dataset(str(path), loaded.train, loaded.test, NAMES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> tuple[Run, Outcome]:
    recipe = train.load_recipe("fast", {"epochs": 3, "batch_size": 16, "precision": "fp32"})
    path = tmp_path_factory.mktemp("runs") / "<b>run"
    return train_run(dataset, Job(dataset.name, recipe), path, Observer())


def test_a_training_leaves_a_page_with_everything(trained: tuple[Run, Outcome], dataset: Dataset) -> None:
    run, outcome = trained
    text = (run.path / "run.html").read_text("utf-8")
    found = parsed(text)
    assert len(text) < 1_000_000
    assert f"{100 * outcome.test.accuracy:.2f} % of 30 test images right, after 3 epochs" in text
    wrong = outcome.test.count - outcome.test.correct
    assert len(found.addresses) == min(wrong, 24) + 1
    for row in outcome.test.by_class(NAMES):
        assert f"<td>{row['predicted']}</td><td>{row['correct']}</td>" in text
    assert "&lt;script&gt;" in text
    assert r"\x1b[31m" in text
    for layer in ("bn1", "bn2", "bn3"):
        assert f"<h3>{layer}</h3>" in text
    assert text.count("<svg") == 3 + 3 * 3
    assert "<dt>learning_rate</dt><dd>0.4</dd>" in text
    assert torch.__version__ in text


def test_the_batch_is_what_the_first_step_saw(trained: tuple[Run, Outcome], dataset: Dataset) -> None:
    run, outcome = trained
    assert outcome.seen is not None
    text = (run.path / "run.html").read_text("utf-8")
    sheet = Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([\w+/=]+)", text)[-1])))
    assert np.array_equal(np.asarray(sheet)[:16, :16], outcome.seen[0, 0])
    # Moved by at most a pixel, and otherwise as it was read.
    wide = np.pad(dataset.train.images[:, 0], ((0, 0), (1, 1), (1, 1)))
    moved = [wide[:, down : down + 16, right : right + 16] for down in range(3) for right in range(3)]
    assert any((outcome.seen[0, 0] == each).all(axis=(1, 2)).any() for each in moved)


def test_f1_and_the_worst_mistakes() -> None:
    from gammabeta.train.evaluate import Evaluation, worst_mistakes

    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    result = Evaluation(2, 4, 0.5, torch.tensor([[1, 0], [2, 1]]), probabilities)
    worst, many = worst_mistakes(result, labels, 1)
    assert (worst.tolist(), many) == ([2], 2)
    assert [row["f1"] for row in result.by_class("ab")] == [pytest.approx(0.5), pytest.approx(0.5)]
    empty = Evaluation(1, 1, 0.0, torch.tensor([[1, 0], [0, 0]])).by_class("ab")
    assert empty[1]["f1"] is None


def test_a_page_that_cannot_be_written_costs_no_training(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> str:
        raise RuntimeError("no template")

    monkeypatch.setattr(page, "page", fails)
    recipe = train.load_recipe("fast", {"epochs": 1, "batch_size": 32, "precision": "fp32"})
    with pytest.warns(GammabetaWarning, match=r"page of .* could not be written: no template"):
        run, _ = train_run(dataset, Job(dataset.name, recipe), tmp_path / "run", Observer())
    assert run.info.status == "finished"
    assert not (run.path / "run.html").exists()


def test_runs_side_by_side(trained: tuple[Run, Outcome], dataset: Dataset) -> None:
    run, outcome = trained
    sheets = [page.Shown(run, "test", outcome.test, dataset.test, outcome.seen), page.Shown(run)]
    text = page.page(sheets)
    parsed(text)
    assert '<p class="bad">' not in text.partition("<section>")[0]
    other = run.info.model_copy(update={"data_sha256": "0" * 64})
    apart = page.page([page.Shown(run), page.Shown(Run(run.path, other, run.recipe))])
    assert '<p class="bad">' in apart.partition("<section>")[0]
    assert "<h1>2 runs</h1>" in text
    assert text.count("<section>") == 2
    assert text.count("What was taken for what") == 1


def test_many_classes_are_told_by_their_worst_pairs(trained: tuple[Run, Outcome], dataset: Dataset) -> None:
    from gammabeta.train.evaluate import Evaluation

    run, _ = trained
    names = [f"class {number}" for number in range(40)]
    many = Run(
        run.path,
        run.info.model_copy(update={"network": run.info.network.model_copy(update={"classes": names})}),
        run.recipe,
    )
    table = torch.eye(40, dtype=torch.int64)
    table[3, 7] = 5
    images = Split(dataset.test.images[:1], np.array([0]))
    text = page.page([page.Shown(many, "test", Evaluation(40, 45, 0.1, table), images)])
    parsed(text)
    assert '<td class="t">class 3</td><td class="t">class 7</td><td>5</td>' in text


def test_a_run_whose_data_are_gone_has_a_page_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "two.npz"
    images = np.arange(40 * 256).reshape(40, 16, 16).astype(np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(40) % 2, x_test=images[:8], y_test=np.arange(8) % 2)
    recipe = train.load_recipe("fast", {"epochs": 1, "batch_size": 20, "precision": "fp32"})
    run, outcome = train_run(data.load(path), Job(str(path), recipe), tmp_path / "run", Observer())
    again = shown(run.path)
    assert again.judged is not None
    assert again.judged.correct == outcome.test.correct
    assert again.batch is not None
    assert outcome.seen is not None
    assert np.array_equal(again.batch, outcome.seen)
    assert evaluate(run.path).correct == evaluate(load_model(run.path)).correct == outcome.test.correct
    path.unlink()
    with pytest.warns(GammabetaWarning, match="has no images"):
        parsed(page.page([shown(run.path)]))
