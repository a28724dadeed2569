"""Benchmarks: correctness first, peers interleaved in one run, medians, the machine named."""
