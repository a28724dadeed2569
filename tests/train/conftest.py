"""A small real data set, so that a test trains in a second."""

import pytest

from gammabeta import data
from gammabeta.data import Dataset, Split


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Return 640 training and 200 test digits of MNIST."""
    full = data.load("mnist")
    train = Split(full.train.images[:640].copy(), full.train.labels[:640].copy())
    test = Split(full.test.images[:200].copy(), full.test.labels[:200].copy())
    return Dataset("digits", train, test, full.classes)
