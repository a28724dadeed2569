"""The model that a command works on, and the data to run it on: where they are found, and what can go wrong.

A model is a run folder of ours, or ``module:function`` of the user's; weights may come from a file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, GammabetaError, UsageError, out_of_memory
from .output import console

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from ..data import Dataset, Split
    from ..train.load import Trained

Name = Annotated[
    str,
    typer.Argument(
        help="A run folder; or module:function, which makes a model (module.py in this folder); or timm:NAME."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Weights to load: safetensors, or a torch file that holds only tensors.")
]
Shape = Annotated[
    str | None,
    typer.Option(help="One input of module:function's model, such as 3x224x224, without the batch."),
]
Best = Annotated[bool, typer.Option("--best", help="The best epoch's weights, not the last's.")]


_SHOWN = 40  # classes that a note names
_FACTORY = re.compile(r"[\w.]+(?<!\.py):[\w.]*")  # and no path with a colon in it


@dataclass(frozen=True)
class Model:
    """A model, where it runs, and its run when it is one of ours."""

    name: str
    module: nn.Module
    device: torch.device
    trained: Trained | None = None


def find_model(name: str, weights: Path | None = None, device: str = "auto", *, best: bool = False) -> Model:
    """Open a run folder, or make ``module:function`` or ``timm:NAME``; then load weights, if any."""
    from ..train.world import resolve_device

    place = resolve_device(device)
    if Path(name).is_dir():
        from ..train.load import load_model

        trained = load_model(name, device, best=best)
        found = Model(name, trained.model, place, trained)
    elif _FACTORY.fullmatch(name):
        from ..train.given import given_network

        found = Model(name, given_network(name, 3, 1000, 0).to(place), place)
    else:
        told = f"{name} is neither a run folder nor module:function nor timm:NAME"
        raise UsageError(f"{told}{_module_here(name)}")
    if weights is not None:
        from ..files import fit_weights
        from ..train.given import read_weights

        fit_weights(found.module, read_weights(weights), weights)
    return found


def _module_here(name: str) -> str:
    """What to write where somebody named a module, or its file, without a function of it."""
    stem = name.partition(":")[0].removesuffix(".py")
    return f"; name a function of it, as in {stem}:make" if Path(f"{stem}.py").is_file() else ""


def example_input(model: Model, shape: str | None) -> Tensor:
    """Return a random input of batch size 2: of the run's images, or of ``--shape``."""
    import torch

    if model.trained is not None:
        network = model.trained.run.info.network
        return torch.randn(2, network.channels, network.height, network.width)
    if shape is None:
        raise UsageError("say the shape of one input with --shape, such as --shape 3x224x224")
    parts = shape.lower().replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--shape is sizes joined by x, such as 3x224x224, not {shape!r}")
    return torch.randn(2, *map(int, parts))


def write_weights(model: nn.Module, path: Path) -> None:
    """Save the model's state dict: as safetensors by that suffix, else as a torch file."""
    import torch

    from ..files import serialize, write_atomically

    check_folder(path, "--out")
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    if path.suffix.lower() == ".safetensors":
        write_atomically(path, serialize(state), UsageError)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue(), UsageError)


def check_folder(path: Path, option: str) -> None:
    """Raise ``UsageError`` unless the file that an option names would be in a folder that exists."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: {option} must name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder: {option} must name a file in one that exists")


class ArrayLoader:
    """Batches of a split of ours in an order drawn once, so that every pass has the same batches.

    A pixel becomes ``(pixel - mean) * scale`` of its channel; without them, ``pixel / 255``.
    """

    def __init__(self, split: Split, batch: int, *scaling: tuple[float, ...]) -> None:
        import torch

        self.images, self.labels = split.images, torch.from_numpy(split.labels)
        self.batch, self.scaling = batch, [torch.tensor(values).view(-1, 1, 1) for values in scaling]
        self.order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        for index in self.order.split(self.batch):
            pixels = torch.from_numpy(self.images[index.numpy()]).float()
            if self.scaling:
                mean, scale = self.scaling
                yield (pixels - mean) * scale, self.labels[index]
            else:
                yield pixels / 255, self.labels[index]

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)


def load_batches(model: Model, data: str | None, split: str, batch: int) -> Iterable[Any] | None:
    """Return the batches to run the model on: a data set of ours, ``module:loader``, or the run's own data.

    None when no data are named and the model is not a run. What is to be told of the data goes to standard
    error.
    """
    if data is not None and _FACTORY.fullmatch(data) and not Path(data).exists():
        from ..train.given import called, imported

        made = imported(data)
        loader = called(data, made) if callable(made) else made
        if not isinstance(loader, Iterable):
            raise UsageError(f"{data} gave {type(loader).__name__}, not something to iterate over")
        return loader
    if model.trained is not None:
        from ..train.load import load_dataset

        scaling = model.trained.scaling
        dataset = load_dataset(model.trained, data)
        tell(dataset.notes)
        return ArrayLoader(dataset.split(split), batch, scaling.mean, scaling.scale)
    if data is None:
        return None
    from ..data import load

    dataset = load(data)
    tell(dataset.notes)
    return ArrayLoader(dataset.split(split), batch)


def tell(notes: Iterable[str]) -> None:
    """Print what somebody should know about their data on standard error."""
    for note in notes:
        console(True).print(f"gammabeta: note: {note}", markup=False)


def lacking(dataset: Dataset, part: str) -> list[str]:
    """Say which classes have no pictures in a split, if there are any."""
    names = dataset.missing(part)
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return [f"no {part} pictures of {', '.join(map(repr, names[:_SHOWN]))}{more}"] if names else []


@contextmanager
def running(what: str) -> Iterator[None]:
    """Turn what a user's model or loader raises into one line."""
    try:
        yield
    except UsageError as error:
        unfit, found, _ = str(error).partition(": give forward_fn=")
        if not found:
            raise
        advice = f"let the loader give what it takes, or {what} a model that takes the batch"
        raise UsageError(f"{unfit}: {advice}") from error
    except (GammabetaError, KeyboardInterrupt):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise DataError(f"{what} could not run: {type(error).__name__}: {error}") from error


@contextmanager
def bar(screen: Console, title: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over samples; gives the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    hidden = quiet or not screen.is_terminal  # in a file it would leave an empty line
    with Progress(*columns, console=screen, disable=hidden, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def sample_count(loader: Iterable[Any] | None, samples: int | None, batch: int) -> int | None:
    """Return how many samples one pass will see; None where that is not known beforehand."""
    if isinstance(loader, ArrayLoader):
        whole = len(loader.labels)
        return whole if samples is None else min(whole, -(-samples // batch) * batch)
    return samples
