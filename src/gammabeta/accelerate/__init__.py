"""Quicker layers for whole networks on the CPU, for training and for serving."""
