"""Files that are complete or absent: atomic writing, checked reading."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import GammabetaError, RunError, WeightsError
from .jsontext import from_json
from .text import storable

_LARGEST_JSON = 64 << 20  # bytes; a run's own documents are a thousand times smaller


@contextmanager
def reporting(attempt: str, advice: str = "", error: type[GammabetaError] = RunError) -> Iterator[None]:
    """Turn an ``OSError`` into one line: what cannot be done, the system's reason, what to do about it."""
    try:
        yield
    except OSError as cause:
        raise error(f"cannot {attempt}: {cause.strerror}{advice}") from None


def write_atomically(path: Path, content: bytes, error: type[GammabetaError] = RunError) -> None:
    """Write a file so that at any moment either the old content or the new is there, whole.

    ``error`` is raised if it cannot be written (no space, no permission); the old file is then as it was.
    """
    with reporting(f"write {path}", "; free space or choose another folder", error):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # not every system can open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def read_bytes(path: Path, most: int, error: type[GammabetaError] = RunError) -> bytes:
    """Read a file of at most ``most`` bytes; ``error`` if it is larger, no plain file, or cannot be read."""
    with reporting(f"read {path}", error=error):
        if "\0" in str(path):
            raise error(f"cannot read {path}: a name cannot hold a null character")
        if path.exists() and not path.is_file():
            raise error(f"cannot read {path}: it is not a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path} is larger than any that gammabeta writes")
    return content


def read_json(path: Path) -> Any:
    """Read a JSON document of ours; ``RunError`` if it is missing, too large or not JSON."""
    content = read_bytes(path, _LARGEST_JSON)
    try:
        return from_json(content.decode("utf-8"))
    except ValueError:
        raise RunError(f"{path} is damaged: it is not valid JSON") from None


def serialize(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors in the safetensors format."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors by name, and metadata; ``WeightsError`` if it is missing, damaged or not safetensors."""
    try:
        with path.open("rb") as opened:
            # Its library takes names in UTF-8 only.
            name = str(path) if storable(str(path)) == str(path) else f"/dev/fd/{opened.fileno()}"
            with safe_open(name, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise WeightsError(f"there is no weights file {path}") from None
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise WeightsError(f"{path} is not a readable safetensors file: {reason}") from None


def fit_weights(model: nn.Module, tensors: dict[str, Tensor], source: object) -> nn.Module:
    """Load tensors into a model, all or none; ``WeightsError`` names the first tensor that does not fit.

    Floating point numbers of another precision are converted to the model's.
    """
    wanted = model.state_dict()
    for name in [*wanted, *tensors]:
        if name not in tensors:
            raise WeightsError(f"{source} does not fit the network: it lacks {name[:100]}")
        if name not in wanted:
            raise WeightsError(
                f"{source} does not fit the network: it has {name[:100]}, which the network lacks"
            )
        check_fit(name, tensors[name], wanted[name], source)
    fitted = {name: tensors[name].to(tensor.dtype) for name, tensor in wanted.items()}
    model.load_state_dict(fitted, assign=any(tensor.is_meta for tensor in wanted.values()))
    return model


def check_fit(name: str, found: Tensor, wanted: Tensor, source: object) -> None:
    """Raise ``WeightsError`` unless a tensor has the shape and the kind of numbers that are wanted."""
    shapes = tuple(found.shape), tuple(wanted.shape)
    if shapes[0] != shapes[1]:
        raise WeightsError(
            f"{source} does not fit the network: {name} is {shapes[0]} where {shapes[1]} is wanted"
        )
    if _kind(found) != _kind(wanted):
        kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (found, wanted)]
        raise WeightsError(
            f"{source} does not fit the network: {name} is {kinds[0]} where {kinds[1]} is wanted"
        )


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def check_values(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise ``WeightsError`` if a value is not finite, or a variance is negative: no answer can be right."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise WeightsError(f"{source} holds numbers that are not finite in {name[:100]}")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise WeightsError(f"{source} holds negative variances in {name[:100]}")


def make_folder(path: Path) -> None:
    """Make a folder for a run or for pictures, and its parents; ``RunError`` if that cannot be."""
    with reporting(f"make the folder {path}", "; choose another folder with --out"):
        path.mkdir(parents=True, exist_ok=True)
