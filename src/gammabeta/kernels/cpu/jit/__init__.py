"""The CPU kernels themselves, in Numba, and their compiler.

Only ``arguments`` and ``compiler`` are imported once the machine code is on disk.
"""
