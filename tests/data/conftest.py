"""What the tests of data share: small data sets on disk, and the digits of MNIST."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from gammabeta.data import Dataset, load, write_idx

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    return load("mnist")


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Import a file of scripts/ as a module."""

    def load_script(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load_script


Arrays = dict[str, npt.NDArray[np.uint8]]


@pytest.fixture
def arrays() -> Arrays:
    """Twelve training and five test images of 6×5 in three classes, each class in both."""
    random = np.random.default_rng(7)
    return {
        "train-images-idx3-ubyte": random.integers(0, 256, (12, 6, 5), np.uint8),
        "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % 3,
        "t10k-images-idx3-ubyte": random.integers(0, 256, (5, 6, 5), np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(5, dtype=np.uint8) % 3,
    }


@pytest.fixture
def idx_folder(tmp_path: Path, arrays: Arrays) -> Path:
    folder = tmp_path / "digits"
    folder.mkdir()
    for name, items in arrays.items():
        write_idx(folder / name, items)
    return folder
