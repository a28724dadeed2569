"""Batch normalization on the CPU: what ``gammabeta.kernels`` promises, in Numba."""
