"""Runs side by side: a table of figures and a picture of curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..errors import UsageError
from .plots import COLORS, save_figure, tidy
from .run import Run

_FIELDS = ("test_accuracy", "train_accuracy", "test_loss", "loss", "images_per_second")


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each run its name, status, figures, and the settings in which the runs differ."""
    differing = differences(runs)
    table = []
    for run in runs:
        result = run.info.result or {}
        settings = run.recipe.model_dump() | {"seed": run.info.seed, "data": run.info.data}
        table.append(
            {
                "run": str(run.path),
                "status": run.info.status,
                **{field: result.get(field) for field in _FIELDS},
                "train_seconds": result.get("seconds", {}).get("train"),
                "settings": {field: settings[field] for field in differing},
            }
        )
    return table


def differences(runs: Sequence[Run]) -> list[str]:
    """Return the recipe fields, ``seed`` and ``data`` that are not the same in all runs."""
    settings = [run.recipe.model_dump() | {"seed": run.info.seed, "data": run.info.data} for run in runs]
    return [field for field in settings[0] if len({str(each[field]) for each in settings}) > 1]


def picture(runs: Sequence[Run], path: Path) -> None:
    """Draw loss and accuracy of all runs over epochs into ``path`` (PNG).

    Raises:
        UsageError: None of the runs has got so far as to have figures.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    drawn = 0
    for number, run in enumerate(runs):
        metrics = run.metrics()
        steps = [row for row in metrics if row["kind"] == "progress"]
        judged = [row for row in metrics if row["kind"] == "evaluation" and row["split"] == "test"]
        if not steps:
            continue
        drawn += 1
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "label": run.path.name}
        loss_axes.plot([row["epochs"] for row in steps], [row["loss"] for row in steps], **style)
        accuracy_axes.plot(
            [row["epochs"] for row in judged], [100 * row["accuracy"] for row in judged], marker="o", **style
        )
    if not drawn:
        raise UsageError("none of these runs has figures yet")
    loss_axes.set(xlabel="epoch", ylabel="training loss, moving average (nats)", yscale="log")
    accuracy_axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    loss_axes.legend(frameon=False)
    tidy((loss_axes, accuracy_axes))
    save_figure(figure, path)
