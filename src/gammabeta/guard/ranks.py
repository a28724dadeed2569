"""Whether the ranks of a training hold the same running statistics."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..doctor.finding import Finding
from ..graph.layers import BatchNormLayer
from .reading import Reading, read

CAUSE = "each process averages its own batches, and nothing makes the averages equal"
FIX = 'use gammabeta.convert(model, to="sync"), or broadcast_buffers=True'


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def alone(model: nn.Module, norms: dict[str, BatchNormLayer]) -> dict[str, BatchNormLayer]:
    """Layers whose statistics nothing makes equal; a broadcast does, at the next forward pass."""
    wrapped = nn.parallel.DistributedDataParallel
    if world() == 1 or any(isinstance(m, wrapped) and m.broadcast_buffers for m in model.modules()):
        return {}
    return {name: layer for name, layer in norms.items() if "Sync" not in type(layer).__name__}


def gather(layers: Sequence[BatchNormLayer], step: int) -> list[Reading]:
    """What every rank holds; all must call this, at the same step."""
    mine = read(list(layers), step)
    everyone = [mine] * world()
    dist.all_gather_object(everyone, mine)
    return everyone


def apart(everyone: Sequence[Reading], names: Sequence[str]) -> Iterator[Finding]:
    """Layers whose statistics are not the same bits in every rank's reading, and how far they are apart."""
    for index, name in enumerate(names):
        means = torch.stack([reading.mean[index] for reading in everyone])
        variances = torch.stack([reading.var[index] for reading in everyone])
        if all(bool(((t == t[0]) | (t.isnan() & t[0].isnan())).all()) for t in (means, variances)):
            continue
        low, high = variances.aminmax(dim=0)
        shift = float(((means.amax(0) - means.amin(0)) / high.clamp(min=1e-12).sqrt()).max())
        factor = float((high / low.clamp(min=1e-12)).max())
        yield Finding(
            "warning",
            f"the running means of {len(everyone)} processes are up to {shift:.2g} standard deviations apart,"
            f" their variances up to a factor of {factor:.3g}",
            CAUSE,
            FIX,
            {"shift": shift, "factor": factor},
            check="rank-divergence",
            layer=name,
        )
