"""What ``doctor`` and ``recalibrate`` work on: one of our runs, or what ``module:factory`` makes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, GammabetaError, UsageError, WeightsError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from ..data import Split
    from ..train.load import Trained


@dataclass
class Target:
    """A model, where it runs, and its run when it is one of ours."""

    name: str
    model: nn.Module
    device: torch.device
    trained: Trained | None = None


def load_target(name: str, weights: Path | None, device: str) -> Target:
    """Open a run folder, or import ``module:factory`` from here and give the model its weights.

    Raises:
        RunError, WeightsError, UsageError: what cannot be opened, read or imported, and what to do.
    """
    from ..train.device import resolve_device

    place = resolve_device(device)
    if Path(name).is_dir():
        from ..train.load import load_model

        trained = load_model(name, device)
        target = Target(name, trained.model, place, trained)
    elif ":" in name:
        target = Target(name, _made_by(name).to(place), place)
    else:
        raise UsageError(f"{name} is neither a run folder nor module:factory")
    if weights is not None:
        from ..train.files import fit_weights

        fit_weights(target.model, read_weights(weights), weights)
    return target


def _made_by(name: str) -> nn.Module:
    from torch import nn

    made = imported(name)
    model = made if isinstance(made, nn.Module) else _called(name, made)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _called(name: str, factory: Any) -> Any:
    if not callable(factory):
        raise UsageError(f"{name} is a {type(factory).__name__}: name a function that takes no arguments")
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
    """A state dict from safetensors, or from a torch file read without running any code in it.

    Raises:
        WeightsError: the file is missing, damaged, or holds something else.
    """
    import torch
    from torch import Tensor

    from ..train.files import load_weights

    if path.suffix == ".safetensors":
        return load_weights(path)[0]
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{path} is not a torch file of plain weights: {reason}") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no state dict")
    return {key.removeprefix("module."): value for key, value in content.items()}


def write_weights(model: nn.Module, path: Path) -> None:
    """Save the model's state dict: as safetensors by that suffix, else as a torch file."""
    import torch

    from ..train.files import save_weights

    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder: --out must name a file in one that exists")
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_weights(path, state, {})
    else:
        torch.save(state, path)


class ArrayLoader:
    """Batches of a split of ours in an order drawn once, so that every pass sees the same."""

    def __init__(self, split: Split, numbers: Callable[[Any], Tensor], batch: int) -> None:
        import torch

        self.images, self.labels = split.images, torch.from_numpy(split.labels)
        self.numbers, self.batch = numbers, batch
        self.order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self.order.split(self.batch):
            yield self.numbers(self.images[index.numpy()]), self.labels[index]

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)


def load_batches(target: Target, data: str | None, split: str, batch: int) -> Iterable[Any] | None:
    """The loader to run the model on: a data set of ours, ``module:loader``, or the run's own data.

    Returns None when nothing was named and the target is not a run.
    """
    if data is not None and ":" in data and not Path(data).exists():
        made = imported(data)
        loader = _called(data, made) if callable(made) else made
        if not isinstance(loader, Iterable):
            raise UsageError(f"{data} gave a {type(loader).__name__}, not something to iterate over")
        return loader
    if target.trained is not None:
        return _run_batches(target.trained, data, split, batch)
    if data is None:
        return None
    from ..data import load

    if split not in ("test", "train"):
        raise UsageError(f"unknown split {split!r}: choose test or train")
    dataset = load(data)
    return ArrayLoader(dataset.test if split == "test" else dataset.train, _unit, batch)


def _unit(pixels: Any) -> Tensor:
    import torch

    return torch.from_numpy(pixels).float() / 255


def _run_batches(trained: Trained, data: str | None, split: str, batch: int) -> ArrayLoader:
    import torch

    from ..train.load import load_split

    mean = torch.tensor(trained.scaling.mean).view(-1, 1, 1)
    scale = torch.tensor(trained.scaling.scale).view(-1, 1, 1)

    def numbers(pixels: Any) -> Tensor:
        return (torch.from_numpy(pixels).float() - mean) * scale

    return ArrayLoader(load_split(trained, data, split), numbers, batch)


@contextmanager
def running(what: str) -> Iterator[None]:
    """Turn what a user's model or loader raises into one line."""
    try:
        yield
    except (GammabetaError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise DataError(f"{what} could not run: {type(error).__name__}: {error}") from error


@contextmanager
def bar(console: Console, title: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over samples; gives the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=quiet, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def sample_count(loader: Iterable[Any] | None, samples: int | None, batch: int) -> int | None:
    """How many samples one pass will see, as far as one can say beforehand."""
    if isinstance(loader, ArrayLoader):
        whole = len(loader.labels)
        return whole if samples is None else min(whole, -(-samples // batch) * batch)
    return samples
