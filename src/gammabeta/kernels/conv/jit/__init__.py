"""The convolution kernels themselves, in Numba."""
