"""How digits drawn by a script, and MNIST as enlarged photos, are read by ``fast`` and ``best``.

The drawings are those of ``benchmarks/drawings.py``. Methods were chosen on seeds from 1000 and 2000 on;
what is reported here has other seeds.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.drawings import STYLES, drawings
from benchmarks.harness import Options, Result
from gammabeta import data
from gammabeta.data.classify import Classifier, Prediction
from gammabeta.train import Run, load_recipe
from gammabeta.train.fitting import Observer
from gammabeta.train.load import load_model
from gammabeta.train.run import Job
from gammabeta.train.session import train_run

RECIPES = ("fast", "best")
FIRST_SEED = 9000
SURE = 0.9


def add_options(parser: Any) -> None:
    """Runs that are there already, in place of new ones."""
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="run folders; else new ones")
    parser.add_argument("--count", type=int, default=20, help="drawings of each digit in each style")


def judged(answers: list[Prediction | None], labels: list[int]) -> dict[str, Any]:
    """Figures of one style; None stands for a picture on which nothing was found."""
    right = [a is not None and a.label == str(label) for a, label in zip(answers, labels, strict=True)]
    wrong = [a for a, good in zip(answers, right, strict=True) if a is not None and not good]
    doubted = sum(a is None or a.doubt for a in answers)
    return {
        "pictures": len(labels),
        "right": round(sum(right) / len(labels), 4),
        "wrong above 90 %": sum(a.probability > SURE for a in wrong),
        "surest wrong": round(max((a.probability for a in wrong), default=0.0), 3),
        "in doubt": doubted,
        "wrong without doubt": sum(not a.doubt for a in wrong),
    }


def answers(classifier: Classifier, contents: list[bytes]) -> list[Prediction | None]:
    """The answers for pictures; None where there is none."""
    found = classifier.answers([("drawing", BytesIO(content)) for content in contents])
    return [answer if isinstance(answer, Prediction) else None for _, answer in found]


def of_style(classifiers: dict[str, Classifier], style: str, count: int) -> Iterator[dict[str, Any]]:
    """A row for each classifier: its figures on new drawings in a style."""
    drawn = list(drawings(style, count, FIRST_SEED))
    labels, contents = [digit for digit, _, _ in drawn], [content for _, _, content in drawn]
    for name, classifier in classifiers.items():
        yield {"case": style, "recipe": name, **judged(answers(classifier, contents), labels)}


def photo(digit: npt.NDArray[np.uint8], random: np.random.Generator) -> bytes:
    """A test digit five times as large, dark on light paper, with a margin and a little noise."""
    large = Image.fromarray(digit).resize((140, 140), Image.Resampling.BICUBIC)
    page = np.full((200, 200), 235.0)
    page[30:170, 30:170] -= 0.8 * np.asarray(large, np.float64)
    page += random.normal(0, 2, page.shape)
    buffer = BytesIO()
    Image.fromarray(np.clip(page, 0, 255).astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def enlarged(classifiers: dict[str, Classifier], step: int) -> Iterator[dict[str, Any]]:
    """Every ``step``-th test digit as it is and as an enlarged photo."""
    test = data.load("mnist").test
    images, labels = np.ascontiguousarray(test.images[::step]), test.labels[::step].tolist()
    random = np.random.default_rng(FIRST_SEED)
    photos = [photo(image[0], random) for image in images]
    for name, classifier in classifiers.items():
        shares = classifier.probabilities(images)
        own = float((shares.argmax(1) == labels).mean())
        row = {"case": "MNIST, enlarged", "recipe": name, **judged(answers(classifier, photos), labels)}
        yield row | {"points lost": round(100 * (own - row["right"]), 2)}


def trained(recipe: str, folder: Path) -> Classifier:
    """Train a recipe on MNIST into a folder."""
    job = Job("mnist", load_recipe(recipe))
    train_run(job.load(), job, folder, Observer())
    return load_model(folder).classifier


def run(options: Options) -> Result:
    """Read all drawings and all test digits with each network."""
    with TemporaryDirectory() as scratch:
        runs = {f"{Run.open(path).recipe.name}, {path.name}": path for path in options.given.runs}
        if runs:
            classifiers = {name: load_model(path).classifier for name, path in runs.items()}
        else:
            recipes = RECIPES[:1] if options.quick else RECIPES
            classifiers = {recipe: trained(recipe, Path(scratch, recipe)) for recipe in recipes}
        count = 1 if options.quick else options.given.count
        rows = [row for style in STYLES for row in of_style(classifiers, style, count)]
        photos = list(enlarged(classifiers, 50 if options.quick else 1))
    summary = {}
    for name in classifiers:
        own = [row for row in rows if row["recipe"] == name]
        right = sum(row["right"] * row["pictures"] for row in own) / sum(row["pictures"] for row in own)
        sure = sum(row["wrong above 90 %"] for row in own)
        lost = next(row["points lost"] for row in photos if row["recipe"] == name)
        summary[name] = f"{right:.2%} right, {sure} wrong above 90 %; MNIST enlarged loses {lost} points"
    return Result(
        "Drawings", rows + photos, summary, [f"Drawings from seed {FIRST_SEED} on, {count} a digit."]
    )
