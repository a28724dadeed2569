"""Convolutions on the CPU: gradients for training, a first layer without its output, serving."""
