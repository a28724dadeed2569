"""Files that are complete or absent: atomic writing, checked reading."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import GammabetaError, RunError, WeightsError
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


def read_json(path: Path) -> Any:
    """Read a JSON document of ours; ``RunError`` if it is missing, too large or not JSON."""
    with reporting(f"read {path}"):
        if path.stat().st_size > _LARGEST_JSON:
            raise RunError(f"{path} is larger than any run's; it was not written by gammabeta")
        content = path.read_bytes()
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        raise RunError(f"{path} is damaged: it is not valid JSON") from None


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
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
    """Load tensors into a model, all or none; ``WeightsError`` names the first tensor that does not fit."""
    wanted = model.state_dict()
    for name in [*wanted, *tensors]:
        if name not in tensors:
            raise WeightsError(f"{source} does not fit the network: it lacks {name}")
        if name not in wanted:
            raise WeightsError(f"{source} does not fit the network: it has {name}, which the network lacks")
        found, expected = tuple(tensors[name].shape), tuple(wanted[name].shape)
        if found != expected:
            raise WeightsError(
                f"{source} does not fit the network: {name} is {found} where {expected} is wanted"
            )
    model.load_state_dict(tensors, assign=any(tensor.is_meta for tensor in wanted.values()))
    return model


def make_folder(path: Path) -> None:
    """Make a folder for a run or for pictures, and its parents; ``RunError`` if that cannot be."""
    with reporting(f"make the folder {path}", "; choose another folder with --out"):
        path.mkdir(parents=True, exist_ok=True)
