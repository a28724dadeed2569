"""Batch normalization from its equations, in plain tensor code."""
