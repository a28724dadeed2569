"""Batch normalization compiled for the machine it runs on: Numba for the CPU, Triton for GPUs."""
