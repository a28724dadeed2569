"""The gradient at a convolution's input on a CPU with AVX-512."""

import torch
from torch import Tensor

from .compiled.convolution_arguments import COLUMNS, GROUP, PIXELS, pack
from .compiled.key import Key
from .threads import Step, run

_STEPS = {
    dtype: (Step(Key("input_gradient", dtype == torch.bfloat16), once=False),)
    for dtype in (torch.float32, torch.bfloat16)
}


def unsupported(dtype: torch.dtype, out_channels: int, out_pixels: int) -> str | None:
    """Why there is no kernel for such a convolution, None if there is."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the kernel's tiles need the 32 vector registers of AVX-512"
    if dtype not in _STEPS:
        return f"the kernel stores float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and (out_channels % 2 or not torch.cpu._is_avx512_bf16_supported()):
        return "bfloat16 is multiplied in pairs of output channels, by AVX-512 BF16"
    return None if out_pixels >= PIXELS else "the output has fewer pixels than a tile"


def input_gradient(grad: Tensor, weight: Tensor, images: tuple[int, ...], padding: tuple[int, int]) -> Tensor:
    """Return the gradient at a convolution's input, ``(N, C, H, W)`` in channels_last; stride and dilation 1.

    Args:
        grad: ``(N, O, OH, OW)``, the gradient at its output, float32 or bfloat16.
        weight: ``(O, C, KH, KW)``, of the same dtype. Both are copied unless they are channels_last.
        images: The shape of the input.
        padding: ``(PH, PW)``.
    """
    grad = grad.permute(0, 2, 3, 1).contiguous()
    weight = weight.permute(0, 2, 3, 1).contiguous()
    dx = torch.empty(images, dtype=grad.dtype, memory_format=torch.channels_last)
    count, channels, height, width = images
    outs, kernel_height, kernel_width, _ = weight.shape
    columns = -(-kernel_height * kernel_width * channels // COLUMNS) * COLUMNS
    steps = outs // 2 if grad.dtype == torch.bfloat16 else outs
    sheet = channels * (height + 2 * padding[0]) * (width + 2 * padding[1])
    step = 4 * (columns * (steps + GROUP + PIXELS) + -(-sheet // 16) * 16)
    parts = max(1, min(torch.get_num_threads(), count))
    memory = torch.empty(parts * step, dtype=torch.uint8)
    addresses = (grad.data_ptr(), weight.data_ptr(), dx.data_ptr())
    sizes = (count, channels, height, width, outs, kernel_height, kernel_width, *padding)
    run(_STEPS[grad.dtype], pack(*addresses, *sizes, memory.data_ptr(), step, parts), parts, parts)
    return dx
