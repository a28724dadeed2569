"""Digits that nobody has seen, drawn on ten kinds of paper, come out as MNIST's like of them.

The judge is the nearest of 20,000 training digits, as in ``test_picture.py``; what networks make of them is
tested in ``tests/benchmarks/test_drawings.py``.
"""

from io import BytesIO

import numpy as np
import pytest

from benchmarks.drawings import STYLES, drawings
from gammabeta.data import Preparation
from gammabeta.data.picture import find_ink
from gammabeta.data.ruling import without_frames, without_lines


@pytest.fixture(scope="module")
def nearest(mnist):
    rows = mnist.train.images[:20_000].reshape(20_000, -1).astype(np.float32)
    norms = np.square(rows).sum(1)

    def label(picture):
        return int(mnist.train.labels[np.argmin(norms - 2 * rows @ picture.reshape(-1).astype(np.float32))])

    return label


@pytest.mark.parametrize("style", STYLES)
def test_a_drawing_is_prepared_as_the_digit_it_shows(style, nearest):
    prepare = Preparation(1, 28, 28, "digit").prepare
    found = [
        nearest(prepare(BytesIO(content))) == digit for digit, _, content in drawings(style, 1, first_seed=77)
    ]
    assert sum(found) >= 9


def test_a_drawing_follows_from_its_seed():
    first, again, other = (list(drawings("squared", 1, seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def page(height=200, width=240):
    return np.zeros((height, width), bool)


def test_lines_go_and_the_strokes_that_cross_them_stay():
    digit = page()
    digit[50:150, 100:112] = True
    lined = digit.copy()
    lined[20::40] = lined[21::40] = True
    lined[:, 10::45] = lined[:, 11::45] = True
    np.testing.assert_array_equal(without_lines(lined), digit)
    askew = digit.copy()
    for x in range(240):
        askew[(np.arange(20, 190, 40) + 0.05 * x).astype(int), x] = True
    assert (without_lines(askew) != digit).sum() < 20


def test_a_page_of_lines_only_is_left_as_it_is():
    lined = page()
    lined[20::40] = True
    np.testing.assert_array_equal(without_lines(lined), lined)


def test_a_frame_goes_and_what_looks_like_one_stays():
    digit = page()
    digit[60:140, 100:110] = True
    framed = digit.copy()
    framed[40:43, 60:160] = framed[157:160, 60:160] = True
    framed[40:160, 60:63] = framed[40:160, 157:160] = True
    np.testing.assert_array_equal(without_frames(framed), digit)
    alone = framed & ~digit
    np.testing.assert_array_equal(without_frames(alone), alone)
    y, x = np.mgrid[-1:1:200j, -1:1:240j]
    zero = (np.hypot(x * 1.4, y) < 0.8) & (np.hypot(x * 1.4, y) > 0.6)
    np.testing.assert_array_equal(without_frames(zero), zero)


def test_the_edge_of_a_shadow_is_no_ink():
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:240, 0:300]
    light = np.where(x + 0.5 * y > 190, 0.5, 1.0)
    paper = np.full((240, 300), 220.0)
    paper[70:170, 140:152] = 40
    ink = find_ink((paper * light + random.normal(0, 2, paper.shape)).astype(np.float32))
    assert ink is not None
    assert 96 <= ink.shape[0] <= 106
    assert 10 <= ink.shape[1] <= 18
