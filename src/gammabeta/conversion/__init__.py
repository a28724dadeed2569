"""``convert``: another kind of batch norm in a model, fused with what follows it."""
