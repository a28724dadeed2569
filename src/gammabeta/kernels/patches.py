"""Patches added up into the images they were taken from, on the CPU: the adjoint of im2col."""

import torch
from torch import Tensor

from .compiled.compiler import Key
from .compiled.patch_arguments import pack
from .threads import Step, run

_STEPS = {
    dtype: (Step(Key("add_patches", dtype == torch.bfloat16), once=False),)
    for dtype in (torch.float32, torch.bfloat16)
}


def add_patches(
    columns: Tensor, images: Tensor, kernel_size: tuple[int, int], padding: tuple[int, int]
) -> None:
    """Write into ``images`` the sum of the patches that cover each pixel, at stride 1 and dilation 1.

    Args:
        columns: ``(N·OH·OW, KH·KW·C)``, contiguous, float32 or bfloat16; sums are float32 in any case.
        images: ``(N, C, H, W)``, channels_last, of the same dtype; overwritten.
        kernel_size: ``(KH, KW)``.
        padding: ``(PH, PW)``, zeros on each side that the patches reach into and that are left out.
    """
    count, channels, height, width = images.shape
    sheet = 4 * channels * (height + 2 * padding[0]) * (width + 2 * padding[1])
    step = -(-sheet // 64) * 64
    parts = max(1, min(torch.get_num_threads(), count))
    sizes = (count, channels, height, width, *kernel_size, *padding)
    memory = torch.empty(parts * step, dtype=torch.uint8)
    slots = pack(columns.data_ptr(), images.data_ptr(), *sizes, memory.data_ptr(), step, parts)
    run(_STEPS[images.dtype], slots, parts, parts)
