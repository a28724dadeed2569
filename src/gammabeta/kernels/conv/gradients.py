"""The gradients of a convolution on a CPU with AVX-512, at stride and dilation 1."""

import torch
from torch import Tensor

from ..cpu.arguments import packer
from ..cpu.launch import Step, run
from ..cpu.registry import Key
from .arguments import COLUMNS, GROUP, LAID_OUT, PIXELS, ROWS, GradientArguments

_pack = packer(GradientArguments)
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
    columns = -(-weight[0].numel() // COLUMNS) * COLUMNS
    steps = len(weight) // 2 if grad.dtype == torch.bfloat16 else len(weight)
    sheet = -(-_sheet(images, padding) // 16) * 16
    step = 4 * (columns * (steps + GROUP + PIXELS) + COLUMNS + sheet) + 8 * (PIXELS + steps)
    parts = max(1, min(torch.get_num_threads(), images[0]))
    _launch(_STEPS[grad.dtype], grad, weight, dx.permute(0, 2, 3, 1), padding, step, parts)
    return dx


def weight_gradient(grad: Tensor, x: Tensor, kernel: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Return the gradient of a convolution's weight, ``(O, C, KH, KW)`` float32 in channels_last.

    Args:
        grad: ``(N, O, OH, OW)``, the gradient at its output, bfloat16.
        x: ``(N, C, H, W)``, its input, bfloat16. Both are copied unless they are channels_last.
        kernel: ``(KH, KW)``.
        padding: ``(PH, PW)``.
    """
    images = x.shape
    grad, x = grad.permute(0, 2, 3, 1).contiguous(), x.permute(0, 2, 3, 1).contiguous()
    dweight = torch.empty(grad.shape[3], *kernel, images[1])
    vectors = min(4, -(-len(dweight) // 16))
    rows, lanes = ROWS[vectors - 1], 16 * vectors
    padded = -(-dweight[0].numel() // rows) * rows
    sums = -(-len(dweight) // lanes) * padded * lanes
    step = 4 * (sums + LAID_OUT * lanes + _sheet(images, padding) + 16)
    step = -(-(step + 8 * (padded + grad.shape[1] * grad.shape[2])) // 64) * 64
    parts = max(1, min(torch.get_num_threads(), (images[0] + 1) // 2))
    steps = (
        Step(Key("weight_gradient", True, vectors=vectors), once=False),
        Step(Key("finish_weight_gradient", True, vectors=vectors), once=True),
    )
    _launch(steps, grad, dweight, x, padding, step, parts)
    return dweight.permute(0, 3, 1, 2)


def _sheet(images: tuple[int, ...], padding: tuple[int, int]) -> int:
    """The values of one image ``(N, C, H, W)`` with zeros around it."""
    return images[1] * (images[2] + 2 * padding[0]) * (images[3] + 2 * padding[1])


def _launch(
    steps: tuple[Step, ...],
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    padding: tuple[int, int],
    step: int,
    parts: int,
) -> None:
    """Run ``parts`` parts with ``step`` bytes of working memory each; tensors are (N, H, W, C)."""
    memory = torch.empty(parts * step + 64, dtype=torch.uint8)
    fields = {
        "grad": grad.data_ptr(),
        "weight": weight.data_ptr(),
        "x": x.data_ptr(),
        "images": x.shape[0],
        "channels": x.shape[3],
        "height": x.shape[1],
        "width": x.shape[2],
        "out_channels": weight.shape[0],
        "kernel_height": weight.shape[1],
        "kernel_width": weight.shape[2],
        "pad_height": padding[0],
        "pad_width": padding[1],
        "scratch": -(-memory.data_ptr() // 64) * 64,
        "scratch_step": step,
        "parts": parts,
    }
    run(steps, _pack(fields), parts, parts)
