"""``add_patches`` against ``torch.nn.functional.fold``, its definition for contiguous tensors."""

import pytest
import torch
from torch.nn import functional as F

from gammabeta.kernels.patches import add_patches

SHAPES = [  # images (N, C, H, W), kernel, padding
    ((3, 20, 13, 13), (5, 5), (0, 0)),
    ((2, 1, 4, 7), (3, 2), (0, 0)),
    ((1, 70, 5, 5), (1, 1), (0, 0)),
    ((5, 7, 6, 5), (3, 3), (1, 2)),
    ((2, 3, 1, 1), (3, 3), (1, 1)),
    ((1, 16, 3, 9), (3, 9), (0, 0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel", "padding"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_patches_add_up_as_fold_does(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    padding: tuple[int, int],
    dtype: torch.dtype,
    threads: int,
) -> None:
    count, channels, height, width = shape
    out = (height + 2 * padding[0] - kernel[0] + 1, width + 2 * padding[1] - kernel[1] + 1)
    columns = torch.randn(count, *out, *kernel, channels).to(dtype)
    images = torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        add_patches(columns.view(-1, columns[0, 0, 0].numel()), images, kernel, padding)
    finally:
        torch.set_num_threads(before)
    as_fold_reads = columns.double().permute(0, 5, 3, 4, 1, 2).reshape(count, -1, out[0] * out[1])
    truth = F.fold(as_fold_reads, (height, width), kernel, padding=padding)
    terms = F.fold(as_fold_reads.abs(), (height, width), kernel, padding=padding)
    unit = 2.0**-24 * kernel[0] * kernel[1] + (2.0**-8 if dtype is torch.bfloat16 else 0.0)
    assert ((images.double() - truth).abs() <= unit * terms).all()
