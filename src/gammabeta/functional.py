"""``batch_norm``: checks, dispatch to a kernel, the autograd rule."""
