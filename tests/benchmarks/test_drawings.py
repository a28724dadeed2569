"""The drawings' suite: its figures, and what `fast` and `best` reach on drawings that chose nothing."""

import numpy as np
import pytest

from benchmarks.harness import Options
from benchmarks.run import parse
from benchmarks.suites import drawings
from gammabeta import data
from gammabeta.data.classify import Classifier, Prediction


def answer(label, share, why=None):
    return Prediction("x", ((label, share),), None, None, why, np.zeros((1, 2, 2), np.uint8))


def test_the_figures_of_a_style():
    answers = [answer("1", 0.95), answer("2", 0.99), answer("3", 0.7, "unlike"), None]
    assert drawings.judged(answers, [1, 7, 8, 9]) == {
        "pictures": 4,
        "right": 0.25,
        "wrong above 90 %": 1,
        "surest wrong": 0.99,
        "in doubt": 2,
        "wrong without doubt": 1,
    }


def nearest(mnist):
    """A classifier that needs no training: the nearest of 10,000 digits, for sure."""
    rows = mnist.train.images[:10_000].reshape(10_000, -1).astype(np.float32)
    labels, norms = mnist.train.labels[:10_000], np.square(rows).sum(1)

    def probabilities(pictures):
        near = (norms - 2 * pictures.reshape(len(pictures), -1).astype(np.float32) @ rows.T).argmin(1)
        return np.eye(10, dtype=np.float32)[labels[near]]

    return Classifier(mnist.classes, mnist.settled().preparation, probabilities)


def test_a_small_part():
    classifiers = {"nearest": nearest(data.load("mnist"))}
    (row,) = drawings.of_style(classifiers, "thick", 1)
    assert (row["pictures"], row["recipe"]) == (10, "nearest")
    assert row["right"] >= 0.8
    (row,) = drawings.enlarged(classifiers, 500)
    assert row["pictures"] == 20
    assert abs(row["points lost"]) <= 10


@pytest.mark.slow
def test_what_the_recipes_reach(tmp_path):
    result = drawings.run(Options(out=tmp_path, given=parse("drawings", ["--count", "10"]).given))
    for recipe in drawings.RECIPES:
        *styles, photos = [row for row in result.rows if row["recipe"] == recipe]
        assert np.mean([row["right"] for row in styles]) >= 0.95
        assert sum(row["wrong above 90 %"] for row in styles) == 0
        assert photos["points lost"] <= 0.3
