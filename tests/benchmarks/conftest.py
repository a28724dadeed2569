"""A small data set of the notebook's shape, and rows such as the suites make."""

import numpy as np
import pytest

from gammabeta.data import Dataset, Split


@pytest.fixture
def digits():
    random = np.random.default_rng(0)

    def split(count):
        labels = random.integers(0, 10, count)
        images = random.integers(0, 64, (count, 1, 28, 28)).astype(np.uint8)
        images[np.arange(count), 0, 2 * labels, 2 * labels] = 255
        return Split(images, labels.astype(np.int64))

    return Dataset("digits", split(1000), split(1000), tuple("0123456789"))


@pytest.fixture
def row():
    def make(contestant="pytorch-eager", title="PyTorch eager", epoch=10.0, **fields):
        return {
            "contestant": contestant,
            "title": title,
            "recipe": "classic",
            "precision": "fp32",
            "round": 1,
            "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
            "threads": 2,
            "images": 60_000,
            "steps": 938,
            "epoch_seconds": epoch,
            "warmup_seconds": 1.0,
            "evaluate_seconds": 2.0,
            "process_seconds": epoch + 5,
            "moving_loss": 0.06,
            "train_accuracy": 0.988,
            "test_accuracy": 0.987,
            "peak_rss_mb": 500.0,
            "counts": True,
            **fields,
        }

    return make
