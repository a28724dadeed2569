"""What every test stands on: one thread, a fixed seed, no network."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; it asks when it is first imported, by whichever test.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Give each test the same random numbers, whatever ran before it in this process."""
    torch.manual_seed(20150211)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
