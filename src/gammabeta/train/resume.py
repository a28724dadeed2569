"""Going on with a run after an interruption or with more epochs, and beginning with another one's weights."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ..errors import RunError, UsageError, WeightsError
from ..files import check_values, fit_weights, load_weights, reporting
from ..text import storable
from .batches import Order
from .checkpoint import Checkpoints
from .documents import CheckpointInfo, InitialWeights, complaint
from .loop import State, check_state, learning_rate
from .networks import network_of
from .recipe import Recipe, differences, recipe_of
from .run import Run
from .world import resolve_device, resolve_precision


@dataclass(frozen=True)
class Resumption:
    """A run to go on with, its documents and its checkpoint checked; ``state`` is None if it must start over.

    ``recipe`` is the run's, or has the number of epochs that was asked for. ``messages`` say what to know.
    """

    run: Run
    recipe: Recipe
    state: State | None
    messages: list[str]
    given: nn.Module | None = None  # the network, where it is made by the user's code

    @classmethod
    def of(cls, path: Path, epochs: float | None = None, given: nn.Module | None = None) -> "Resumption":
        """Read a run; ``RunError`` if it is finished and no more epochs are asked for, or was changed."""
        run = Run.open(path)
        finished = run.info.status == "finished"
        if finished and epochs is None:
            raise RunError(f"{path} is finished: there is nothing to resume; --epochs N trains it further")
        with torch.device("meta"):
            network = network_of(run.info.network, given)

        def check(state: State) -> None:
            check_state(state, network, "it")

        state, messages = Checkpoints(path).load(check)
        if finished:
            state, more = _end_of(run, state)
            messages += more
            check(state)
        if state is not None:
            _check_unchanged(run, state.values, "" if epochs is None else "epochs")
        return cls(run, _with_epochs(run.recipe, epochs), state, messages, given)

    def begin(self, images: int) -> list[str]:
        """Lock the folder and write it further; return what to tell. ``images``: of the training set."""
        run, state = self.run, self.state
        order = Order(images, self.recipe, run.info.seed)
        messages = [*self.messages, *_elsewhere(run)]
        if state is not None:
            messages += self._place(order)
        else:
            messages.append("no checkpoint yet: starting over")
        run.lock()
        try:
            if run.info.status == "finished" and self.recipe == run.recipe:
                raise RunError(f"{run.path} is finished: there is nothing to resume")
            if state is not None and self.recipe != run.recipe:
                # First of all, so that a kill at any moment leaves a run that goes on in the same way.
                recipe = {"recipe": self.recipe.model_dump(), "seed": run.info.seed}
                Checkpoints(run.path).save(replace(state, values=state.values | recipe))
            info = None if state is None else CheckpointInfo.model_validate(state.values)
            damage = run.reopen(info, images, self.recipe)
        except BaseException:
            run.unlock()
            raise
        return messages if damage is None else [damage, *messages]

    def _place(self, order: Order) -> list[str]:
        """Check that the recipe leads to where the checkpoint is; return what to tell of what comes."""
        assert self.state is not None
        run, step, seen = self.run, self.state.values["step"], self.state.values["images"]
        if order.images_before(step) != seen:
            raise RunError(
                f"{run.path / 'recipe.toml'} was changed: after {step:,} steps of its batch size "
                f"{order.images_before(step):,} images are seen, the checkpoint has seen {seen:,}"
            )
        extended = self.recipe.epochs != run.recipe.epochs or run.info.status == "finished"
        if step > order.steps or (extended and step == order.steps):
            done = step / order.steps_per_epoch
            raise RunError(f"{run.path} has been trained for {done:g} epochs: give more with --epochs")
        told = [f"going on from step {step}"]
        if extended:
            rate = learning_rate(self.recipe, step, order.steps)
            told.append(
                f"training for {self.recipe.epochs:g} epochs in all instead of {run.recipe.epochs:g}; the "
                f"{self.recipe.schedule} schedule is stretched over them: the learning rate is now {rate:.3g}"
            )
        return told


def _with_epochs(recipe: Recipe, epochs: float | None) -> Recipe:
    if epochs is None:
        return recipe
    try:
        return Recipe.model_validate(recipe.model_dump() | {"epochs": epochs})
    except ValidationError as error:
        raise UsageError(complaint(error)) from None


def _check_unchanged(run: Run, values: dict[str, Any], but: str) -> None:
    """Raise ``RunError`` if the run's recipe or seed is not that of its checkpoint, but for one field."""
    path = run.path / "recipe.toml"
    if values["recipe"] is not None:
        before = recipe_of(values["recipe"], run.path / "checkpoints")
        if changed := differences(run.recipe, before, but=but):
            more = (
                ""
                if but or "epochs is" not in changed
                else ", or say with --epochs how many epochs it shall have"
            )
            raise RunError(f"{path} was changed since the checkpoint: {changed}; change it back{more}")
    if values["seed"] not in (None, run.info.seed):
        raise RunError(
            f"{run.path} has seed {run.info.seed}, its checkpoint {values['seed']}: change it back"
        )


def _end_of(run: Run, state: State | None) -> tuple[State, list[str]]:
    """Return where a finished run ended: its last checkpoint, or its weights where that is older."""
    result, here = run.info.result, {"judged": True, "metrics_bytes": run.metrics_bytes}
    if state is not None and (result is None or state.values["step"] == result["steps"]):
        return State(state.tensors, state.values | here), []
    if result is None:
        raise RunError(f"{run.path} has neither a checkpoint nor a result to go on from")
    tensors = {f"model.{name}": tensor for name, tensor in load_weights(run.weights())[0].items()}
    best = result["validation_loss"] if "validation_loss" in result else result["test_loss"]
    values = {"step": result["steps"], "images": result["images"], "loss": result["loss"], "accuracy": None}
    values |= {"seconds": result["seconds"].get("train", 0.0), "best_loss": best, **here}
    told = "it has no checkpoint of its last step: going on from its weights, with no momentum yet"
    return State(tensors, CheckpointInfo.model_validate(values).model_dump()), [told]


def _elsewhere(run: Run) -> list[str]:
    """What differs between this machine and the one that the run was on, if that changes results."""
    told = []
    threads = run.info.provenance.get("machine", {}).get("threads")
    if threads != torch.get_num_threads():
        told.append(f"{torch.get_num_threads()} threads instead of {threads}: last bits may differ")
    precision = resolve_precision(run.recipe.precision, resolve_device(run.job.device))
    if precision != run.info.precision:
        told.append(f"{precision} instead of {run.info.precision}: results may differ")
    return told


def warm_start(
    network: nn.Module, source: str, classes: list[str], sha256: str | None = None
) -> tuple[InitialWeights, str]:
    """Give a network the last weights of the run ``source``; those of classes that it has not stay new.

    Args:
        network: Of the same size as that of the run; only the classes may be others.
        source: The run folder.
        classes: Of the network.
        sha256: What the file of weights must have; None: anything.

    Returns:
        What identifies the weights, and a message.

    Raises:
        RunError: It is no run folder, or its weights are not those of ``sha256``.
        WeightsError: The weights are damaged or do not fit.
    """
    run = Run.open(source)
    path = run.weights()
    tensors, _ = load_weights(path)
    with reporting(f"read {path}"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 not in (None, digest):
        raise RunError(f"{path} is not what this run began with: it has changed since")
    check_values(tensors, path)
    theirs = {name: place for place, name in enumerate(run.info.network.classes)}
    fresh = [name for name in classes if name not in theirs]
    for name in ("fc2.weight", "fc2.bias", "fc.weight", "fc.bias"):  # the last layer's, in either network
        own, old = network.state_dict().get(name), tensors.get(name)
        if (
            own is not None
            and old is not None
            and old.shape == (len(run.info.network.classes), *own.shape[1:])
        ):
            rows = [old[theirs[c]] if c in theirs else own[i] for i, c in enumerate(classes)]
            tensors[name] = torch.stack(rows)
    try:
        fit_weights(network, tensors, path)
    except WeightsError as error:
        alike = "the same image size, channels, batch_norm and hidden_bias"
        raise WeightsError(f"{error}; --init needs a run with {alike}") from None
    told = f"beginning with the weights of {source}"
    told += f"; {len(fresh)} of {len(classes)} classes are new to it" if fresh else ""
    return InitialWeights(run=storable(str(run.path.resolve())), sha256=digest), told
