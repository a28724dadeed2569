"""MNIST, cut or repeated to a size, as files that ``gammabeta train`` reads."""

from pathlib import Path

import numpy as np


def mnist_of(size: int, scratch: Path) -> str:
    """Return what to call a data set of MNIST's first ``size`` training images, repeated if need be.

    It is written into ``scratch`` as IDX files, unless it is MNIST as it is or has been written before.
    """
    from gammabeta.data import load, write_idx

    dataset = load("mnist")
    if size == len(dataset.train):
        return "mnist"
    folder = scratch / f"mnist-{size}"
    if not folder.exists():
        folder.mkdir()
        chosen = np.arange(size) % len(dataset.train)
        parts = (("train", dataset.train, chosen), ("t10k", dataset.test, np.arange(len(dataset.test))))
        for name, split, index in parts:
            write_idx(folder / f"{name}-images-idx3-ubyte", split.images[index, 0])
            write_idx(folder / f"{name}-labels-idx1-ubyte", split.labels[index].astype(np.uint8))
    return str(folder)
