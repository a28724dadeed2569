"""Batch normalization on NVIDIA GPUs: the functions of ``kernels.backend.Backend``, in Triton.

``plan`` cuts a tensor into tiles, ``tiles`` addresses them, ``forward_kernels`` and ``backward_kernels`` are
the kernels, ``host`` launches them. With ``TRITON_INTERPRET=1`` in the environment before Triton is imported,
the same kernels run in Triton's interpreter on CPU tensors: slowly, and only to be tested.

Launches go to the current stream of the tensor's device, whichever device is current; nothing waits for the
GPU, so a step can be captured in a CUDA graph (after one step outside it, which compiles the kernels).
"""
