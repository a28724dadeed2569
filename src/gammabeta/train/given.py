"""Networks and weights that are not ours: ``module:function``, ``timm:NAME``, files of weights."""

import hashlib
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GammabetaError, RunError, UnavailableError, UsageError, WeightsError, installing
from ..files import load_weights
from ..text import storable
from .documents import InitialWeights

TIMM = "timm:"
_TIMM_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)?")  # no prefix by which timm would look elsewhere


def given_network(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """Return the network ``timm:NAME`` or ``module:function``, its random weights drawn by the seed.

    Raises:
        UnavailableError: timm is not installed.
        UsageError: There is no such network, or it cannot be made.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm_network(name, channels, classes) if name.startswith(TIMM) else made_by(name)


def take_weights(network: nn.Module, path: Path, sha256: str | None = None) -> tuple[InitialWeights, str]:
    """Give a network the weights of a file, as far as names and shapes are the same.

    Returns:
        What identifies the weights, and a message.

    Raises:
        RunError: The file is not what ``sha256`` says.
        WeightsError: The file cannot be read, or nothing in it fits.
    """
    theirs, own = read_weights(path), network.state_dict()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 not in (None, digest):
        raise RunError(f"{path} is not what this run began with: it has changed since")
    fitting = {n: t for n, t in theirs.items() if n in own and t.shape == own[n].shape}
    if not any(name in fitting for name, _ in network.named_parameters()):
        raise WeightsError(f"{path} fits no layer of the network")
    network.load_state_dict(fitting, strict=False)
    new = [name for name in own if name not in fitting]
    some = ", ".join(new[:3]) + (", …" if len(new) > 3 else "")
    told = f"beginning with the weights of {path}" + (f"; {len(new)} tensors are new: {some}" if new else "")
    return InitialWeights(run=storable(str(path.resolve())), sha256=digest), told


def timm_network(name: str, channels: int, classes: int) -> nn.Module:
    """Return timm's network ``timm:NAME`` for images of so many channels, with random weights.

    Raises:
        UnavailableError: timm is not installed.
        UsageError: It has no network of this name, or cannot make one for these images.
    """
    try:
        import timm
    except ImportError as error:
        raise UnavailableError(f"{name} needs timm ({error}): {installing('timm')}") from None
    wanted = name.removeprefix(TIMM)
    if not _TIMM_NAME.fullmatch(wanted) or not timm.is_model(wanted):
        raise UsageError(f"timm has no model {wanted[:100]!r}; `timm.list_models()` lists them")
    try:
        made = timm.create_model(wanted, pretrained=False, num_classes=classes, in_chans=channels)
    except Exception as error:
        raise UsageError(f"timm could not make {wanted}: {type(error).__name__}: {error}") from None
    network: nn.Module = made
    return network


def made_by(name: str) -> nn.Module:
    """The network that ``module:function`` makes, or that ``module:object`` is."""
    made = imported(name)
    model = made if isinstance(made, nn.Module) else called(name, made)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gave {type(model).__name__}, not a torch.nn.Module")
    return model


def called(name: str, factory: Any) -> Any:
    """What a function of the user's gives, called without arguments; its errors are the user's to mend."""
    if not callable(factory):
        raise UsageError(f"{name} is {type(factory).__name__}: name a function that takes no arguments")
    try:
        return factory()
    except GammabetaError:
        raise
    except Exception as error:
        raise UsageError(f"{name} could not be called: {type(error).__name__}: {error}") from error


def imported(name: str) -> Any:
    """The object that ``module:object`` names; the current directory is looked at first."""
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"module {module_name} could not be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"module {module_name} has no {attribute}")
        found = getattr(found, part)
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file, of which no code is run; else ``WeightsError``."""
    if path.suffix.lower() == ".safetensors":
        return load_weights(path)[0]
    if not path.is_file():
        raise WeightsError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
        raise WeightsError(f"{path} is not a torch file of plain weights ({reason})") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no state dict")
    return {key.removeprefix("module."): value for key, value in content.items()}
