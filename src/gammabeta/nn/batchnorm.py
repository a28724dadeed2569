"""``BatchNorm1d``, ``BatchNorm2d``, ``BatchNorm3d`` and their lazily sized twins."""

import torch

from .layer import Fused, FusedLazy


class BatchNorm1d(Fused, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``, fused with what follows it; ``Fused`` documents it."""


class BatchNorm2d(Fused, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, fused with what follows it; ``Fused`` documents it."""


class BatchNorm3d(Fused, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``, fused with what follows it; ``Fused`` documents it."""


class LazyBatchNorm1d(FusedLazy, torch.nn.LazyBatchNorm1d):
    """A ``BatchNorm1d`` that takes ``num_features`` from its first input; all else the same."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(FusedLazy, torch.nn.LazyBatchNorm2d):
    """A ``BatchNorm2d`` that takes ``num_features`` from its first input; all else the same."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(FusedLazy, torch.nn.LazyBatchNorm3d):
    """A ``BatchNorm3d`` that takes ``num_features`` from its first input; all else the same."""

    cls_to_become = BatchNorm3d
