"""Statistics of several copies of a model, pooled into one: federated clients, averaged or merged weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ..errors import NotFiniteError, SurgeryError, UsageError
from .moments import Moments
from .norms import NAMES

State = Mapping[str, Any]
Count = float | Mapping[str, float]


def merge_statistics(
    models: Sequence[nn.Module | State],
    *,
    weights: Sequence[float] | None = None,
    counts: Sequence[Count] | None = None,
) -> dict[str, Tensor]:
    """Return the running statistics of all the data that several copies of one model have seen.

    The variance of a union is not the mean of the variances: the means differ too. With ``counts`` nᵢ this
    pools exactly (Chan, Golub and LeVeque 1983, equation 2.1), where ``running_var`` is unbiased::

        μ = Σ nᵢ μᵢ / n        σ² = Σ ((nᵢ − 1) σᵢ² + nᵢ (μᵢ − μ)²) / (n − 1)        n = Σ nᵢ

    With ``weights`` wᵢ (shares of the data, their sum is made 1) it is the limit of large counts:
    σ² = Σ wᵢ (σᵢ² + (μᵢ − μ)²). Sums are in float64.

    This is exact where the copies share their weights, as after one round of federated learning for the
    layers' inputs that each client measured. If you also average the *weights*, no statistic that was
    measured under the old ones is exact any more: ``gb.recalibrate`` the result if you have data.

    Args:
        models: at least one model or state dict; all with the same norms. Instance norms of a model are left
            out, since their statistics are means over instances; a state dict does not tell them apart.
        weights: one number of at least 0 for each model; None: all alike, unless there are ``counts``.
        counts: for each model, how many *values per channel* its statistics stand for (images × height ×
            width): a number for all its layers, or a mapping with one for each layer's name.

    Returns:
        A state dict of the statistics alone, of the first model's dtypes and devices; the numbers of batches
        are summed. ``model.load_state_dict(merged, strict=False)`` takes it in.

    Raises:
        SurgeryError: a norm that another copy lacks or has with another shape, or one that has seen no batch.
        NotFiniteError: a statistic that is not finite, or a negative variance.
        UsageError: no models, or weights or counts that do not fit them.
    """
    left = _of_instances(models)
    states = [
        {key: value for key, value in _state(model).items() if key.rpartition(".")[0] not in left}
        for model in models
    ]
    if not states:
        raise UsageError("merge_statistics needs at least one model or state dict")
    if weights is not None and counts is not None:
        raise UsageError("give weights (shares of the data) or counts (values per channel), not both")
    pairs = statistics_keys(states[0])
    if not pairs:
        raise SurgeryError("the first model keeps no running statistics: there is nothing to merge")
    _same_norms(states, pairs)
    shares = _checked(
        weights if counts is None else counts, len(states), "weights" if counts is None else "counts"
    )
    merged: dict[str, Tensor] = {}
    for layer, (mean, var) in pairs.items():
        present = [_of(share, layer) for share in shares]
        parts = [_part(state, mean, var, i) for i, state in enumerate(states)]
        pooled = _pooled(parts, present) if counts is not None else _mixed(parts, present)
        merged |= {key: new.to(states[0][key]) for key, new in zip((mean, var), pooled, strict=True)}
        merged |= _batches(states, layer, present, parts)
    return merged


def local_statistics(model: nn.Module | State, *, affine: bool = True) -> list[str]:
    """Return the state dict's keys that a client of federated learning keeps at home.

    With ``affine`` these are all keys of every norm (FedBN: Li et al. 2021, algorithm 1); without, the
    statistics alone, and γ and β are shared (SiloBN: Andreux et al. 2020, section 3).

    Raises:
        SurgeryError: the model keeps no running statistics.
    """
    state = _state(model)
    pairs = statistics_keys(state)
    if not pairs:
        raise SurgeryError("the model keeps no running statistics: there is nothing to keep at home")
    kept = {key for layer, pair in pairs.items() for key in (*pair, _key(layer, "num_batches_tracked"))}
    if affine:
        kept |= {_key(layer, name) for layer in pairs for name in ("weight", "bias")}
    return [key for key in state if key in kept]


def statistics_keys(state: State) -> dict[str, tuple[str, str]]:
    """For each norm's name, the keys of its mean and variance, in the state dict's order."""
    found: dict[str, tuple[str, str]] = {}
    for key in state:
        layer, _, name = key.rpartition(".")
        for mean, var in NAMES:
            other = _key(layer, var)
            if name == mean and layer not in found and _alike(state[key], state.get(other)):
                found[layer] = key, other
    return found


def _state(model: nn.Module | State) -> State:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _of_instances(models: Sequence[nn.Module | State]) -> set[str]:
    """The instance norms, whose keys are those of batch norms."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    named = (pair for model in modules for pair in model.named_modules())
    return {name for name, layer in named if isinstance(layer, _InstanceNorm)}


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _alike(mean: Any, var: Any) -> bool:
    known = all(isinstance(tensor, Tensor) and not is_lazy(tensor) for tensor in (mean, var))
    return known and mean.shape == var.shape and mean.numel() > 0


def _same_norms(states: Sequence[State], pairs: dict[str, tuple[str, str]]) -> None:
    for i, state in enumerate(states[1:], 2):
        others = statistics_keys(state)
        missing = [layer for layer in pairs if layer not in others] + [n for n in others if n not in pairs]
        if missing:
            raise SurgeryError(
                f"model 1 and model {i} do not have the same norms: {missing[0] or 'the model itself'} is in "
                "one of them only; merge copies of one architecture"
            )
        for layer, (mean, _) in pairs.items():
            shapes = tuple(states[0][mean].shape), tuple(state[others[layer][0]].shape)
            if shapes[0] != shapes[1] or others[layer] != pairs[layer]:
                raise SurgeryError(
                    f"{layer or 'the norm'} is {shapes[0]} in model 1 and {shapes[1]} in model {i}"
                )


def _checked(given: Sequence[Any] | None, models: int, what: str) -> Sequence[Any]:
    if given is None:
        return [1.0] * models
    if len(given) != models:
        raise UsageError(f"there are {models} models and {len(given)} {what}: give one for each")
    for share in given:
        for number in share.values() if isinstance(share, Mapping) else [share]:
            if not math.isfinite(number) or number < 0:
                raise UsageError(f"{what} must be numbers of at least 0, not {number}")
    return given


def _of(share: Count, layer: str) -> float:
    if not isinstance(share, Mapping):
        return float(share)
    if layer not in share:
        raise UsageError(f"counts has no entry for {layer or 'the norm'}: give one for each layer")
    return float(share[layer])


def _part(state: State, mean: str, var: str, index: int) -> tuple[Tensor, Tensor]:
    values = [state[key].detach().to("cpu", torch.float64) for key in (mean, var)]
    for key, value in zip((mean, var), values, strict=True):
        if not torch.isfinite(value).all() or (key == var and (value < 0).any()):
            raise NotFiniteError(f"{key} of model {index + 1} is not finite, or a variance is negative")
    return values[0], values[1]


def _pooled(parts: list[tuple[Tensor, Tensor]], counts: list[float]) -> tuple[Tensor, Tensor]:
    """Pool exactly; ``parts`` are means and unbiased variances."""
    total = Moments(0, torch.zeros_like(parts[0][0]), torch.zeros_like(parts[0][0]))
    for (mean, var), count in zip(parts, counts, strict=True):
        if not float(count).is_integer():
            raise UsageError(f"counts are whole numbers of values per channel, not {count}; or give weights")
        total.pool(Moments(int(count), mean, var * max(count - 1, 0), batches=1))
    if total.count < 2:
        raise UsageError("counts must be 2 values per channel or more, in all")
    return total.mean, total.unbiased_variance


def _mixed(parts: list[tuple[Tensor, Tensor]], weights: list[float]) -> tuple[Tensor, Tensor]:
    """The moments of a mixture of distributions, whose weights are made to sum to 1."""
    total = math.fsum(weights)
    if not total > 0:
        raise UsageError("at least one weight must be above 0")
    shares = [weight / total for weight in weights]
    mean = sum((share * mean for share, (mean, _) in zip(shares, parts, strict=True)), torch.zeros(()))
    spread = [share * (var + (m - mean).square()) for share, (m, var) in zip(shares, parts, strict=True)]
    return mean, torch.stack(spread).sum(0)


def _batches(
    states: Sequence[State], layer: str, shares: list[float], parts: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The number of batches, summed over the models that count."""
    key = _key(layer, "num_batches_tracked")
    if not all(isinstance(state.get(key), Tensor) for state in states):
        return {}
    numbers = [int(state[key]) for state in states]
    for i, (number, share, (mean, var)) in enumerate(zip(numbers, shares, parts, strict=True), 1):
        # A counter of 0 alone says little: weights of old versions of torch have none.
        if share and not number and not mean.any() and bool((var == 1).all()):
            raise SurgeryError(
                f"{layer or 'the norm'} of model {i} has seen no batch, so its statistics are the initial 0 "
                "and 1: train or recalibrate it, or give it the weight 0"
            )
    total = sum(number for number, share in zip(numbers, shares, strict=True) if share)
    return {key: torch.full_like(states[0][key], total)}
