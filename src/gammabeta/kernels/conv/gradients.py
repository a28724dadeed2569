"""The gradients of a convolution on a CPU with AVX-512, at stride and dilation 1."""

import torch
from torch import Tensor

from ..cpu.launch import Step, run
from ..cpu.registry import Key
from .convolution_arguments import COLUMNS, GROUP, LAID_OUT, PIXELS, pack
from .registers import ROWS

_STEPS = {
    dtype: (Step(Key("input_gradient", dtype == torch.bfloat16), once=False),)
    for dtype in (torch.float32, torch.bfloat16)
}


def unsupported(dtype: torch.dtype, out_channels: int, out_pixels: int) -> str | None:
    """Why there is no kernel for such a convolution's input gradient, None if there is."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the kernel's tiles need the 32 vector registers of AVX-512"
    if dtype not in _STEPS:
        return f"the kernel stores float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and (out_channels % 2 or not torch.cpu._is_avx512_bf16_supported()):
        return "bfloat16 is multiplied in pairs of output channels, by AVX-512 BF16"
    return None if out_pixels >= PIXELS else "the output has fewer pixels than a tile"


def unsupported_weight() -> str | None:
    """Why there is no kernel for a weight's gradient in bfloat16, None if there is."""
    if torch.cpu._is_avx512_bf16_supported():
        return None
    return "the kernel multiplies pairs of bfloat16 values by AVX-512 BF16"


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
    step = 4 * (columns * (steps + GROUP + PIXELS) + COLUMNS + -(-sheet // 16) * 16) + 8 * (PIXELS + steps)
    parts = max(1, min(torch.get_num_threads(), count))
    memory = torch.empty(parts * step, dtype=torch.uint8)
    addresses = (grad.data_ptr(), weight.data_ptr(), dx.data_ptr())
    sizes = (count, channels, height, width, outs, kernel_height, kernel_width, *padding)
    run(_STEPS[grad.dtype], pack(*addresses, *sizes, memory.data_ptr(), step, parts), parts, parts)
    return dx


def weight_gradient(grad: Tensor, x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Return the gradient of a convolution's weight, ``(O, C, KH, KW)`` float32 in channels_last.

    Args:
        grad: ``(N, O, OH, OW)``, the gradient at its output, bfloat16.
        x: ``(N, C, H, W)``, its input, bfloat16. Both are copied unless they are channels_last.
        kernel: ``(KH, KW)``.
        padding: ``(PH, PW)``.
    """
    grad, x = grad.permute(0, 2, 3, 1).contiguous(), x.permute(0, 2, 3, 1).contiguous()
    count, height, width, channels = x.shape
    out_height, out_width, outs = grad.shape[1:]
    dweight = torch.empty(outs, *kernel, channels)
    vectors = min(4, -(-outs // 16))
    rows, lanes = ROWS[vectors - 1], 16 * vectors
    padded = -(-channels * kernel[0] * kernel[1] // rows) * rows
    sheet = channels * (height + 2 * padding[0]) * (width + 2 * padding[1])
    sums = -(-outs // lanes) * padded * lanes
    step = 4 * (sums + LAID_OUT * lanes + sheet + 16)
    step = -(-(step + 8 * (padded + out_height * out_width)) // 64) * 64
    parts = max(1, min(torch.get_num_threads(), (count + 1) // 2))
    memory = torch.empty(parts * step + 64, dtype=torch.uint8)
    sizes = (count, channels, height, width, outs, *kernel, *padding)
    scratch = -(-memory.data_ptr() // 64) * 64
    addresses = (grad.data_ptr(), dweight.data_ptr(), x.data_ptr())
    args = pack(*addresses, *sizes, scratch, step, parts)
    steps = tuple(
        Step(Key(name, True, vectors=vectors), once)
        for name, once in (("weight_gradient", False), ("finish_weight_gradient", True))
    )
    run(steps, args, parts, parts)
    return dweight.permute(0, 3, 1, 2)
