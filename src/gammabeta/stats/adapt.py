"""``adapt``: running statistics for another domain than the one a model was trained on."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..arguments import check_batches, check_model
from ..errors import UsageError
from ..graph.layers import unwrap
from .batches import ForwardFn, call
from .domains import check_new, domains
from .moments import Ranks
from .norms import statistics
from .passes import Passes, Statistics, finish, to_measure
from .preserve import preserved, set_modes


def adapt(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    prior: float = 16,
    domain: str | None = None,
    samples: int | None = None,
    forward_fn: ForwardFn | None = None,
    progress: Callable[[int], object] | None = None,
) -> nn.Module:
    """Mix a model's running statistics with those of unlabelled data of another domain.

    Schneider et al. (2020, "Improving robustness against common corruptions by covariate shift adaptation",
    equation 3), with ``N`` = ``prior`` source samples and ``n`` target samples::

        μ = N / (N + n) μ_source + n / (N + n) μ_target        σ² likewise

    Layers are measured in order, each behind layers that have been adapted already, as it will be used. No
    weight changes. Frozen norms keep what they have, as in ``recalibrate``.

    Args:
        model: any module with batch normalization in it; changed in place.
        loader: batches of the target domain, as for ``recalibrate``; iterated once for each layer.
        prior: how many samples the statistics that the model holds count for; 0 uses the target's alone.
            Few target samples need a large prior: the paper takes 8 to 64 for one image, 0 for 512.
        domain: keep the present statistics too, and put the new ones beside them under this name (see
            ``gb.domains``). None: replace them.
        samples: stop each pass after the batch that completes this number of samples.
        forward_fn: as for ``recalibrate``.
        progress: called after each batch with its number of samples.

    Returns:
        ``model`` itself, which is then in the domain ``domain``.

    Warns:
        NotCalibrated: as ``recalibrate``.

    Raises:
        SurgeryError: no norm with running statistics, or no data that reaches one. The model is unchanged.
        UsageError: a negative prior, an iterator that can be used only once, or a domain that is no name or
            exists already.
    """
    if not 0 <= prior < float("inf"):
        raise UsageError(f"prior is a number of samples of at least 0, not {prior}")
    check_model("adapt", model)
    check_batches("adapt", loader)
    inner = unwrap(model)
    if domain is not None:
        check_new(inner, domain)
    layers, kept = to_measure(inner)
    passes = _Mixing(inner, loader, samples, forward_fn or call, progress, Ranks.here(), {}, prior=prior)
    with preserved(inner, loader), torch.no_grad():
        set_modes(inner, training=False)
        new = passes.measure_in_order(layers)
    if domain is not None:
        domains(inner).add(domain)
    finish(passes, layers, new, kept, "adapted")
    return model


class _Mixing(Passes):
    """Passes whose results are mixed with what the layers hold."""

    def __init__(self, *args: Any, prior: float) -> None:
        super().__init__(*args)
        self.prior = prior

    def measure(self, layers: dict[str, Any], *, stop: bool) -> dict[str, Statistics]:
        measured = super().measure(layers, stop=stop)
        n = self.ranks.total(self.seen)
        share = self.prior / (self.prior + n) if n else 1.0
        return {name: _mixed(layers[name], new, share) for name, new in measured.items()}


def _mixed(layer: Any, new: Statistics, share: float) -> Statistics:
    """``share`` of what the layer holds, and the rest of what was measured."""
    mean, var = statistics(layer) or new[:2]
    return torch.lerp(new[0], mean.to(new[0]), share), torch.lerp(new[1], var.to(new[1]), share), new[2]
