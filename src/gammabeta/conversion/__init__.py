"""``convert``: another kind of batch norm in a model, fused with what follows it."""

from . import fuse as fuse  # an unpickled model asks for it by way of `rewrite`
