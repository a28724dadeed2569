"""Batch normalization modules that stand in for ``torch.nn``'s own."""
