"""From a study to its result: every seed, the verdict, and what can be written down of it."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import torch

from ..data import Dataset, load
from ..errors import RunError
from ..train.provenance import commit, machine, versions
from . import find
from .study import Measured, Results, Study, Verdict, judge
from .trial import Trial

FORMAT = 1  # of the JSON documents
Told = Callable[[int], object]


@cache
def _read(name: str) -> Dataset:
    return load(name)


def dataset_for(study: Study, clothing: str | None) -> tuple[Dataset | None, str]:
    """Return a study's data, and a note where they are not those it asks for.

    ``clothing`` is a name or path of Fashion-MNIST, which is not inside the package; None: MNIST stands in.
    """
    if not study.data:
        return None, ""
    if study.data == "digits" or clothing is None:
        note = "" if study.data == "digits" else "MNIST in place of Fashion-MNIST, which --data would give"
        return _read("mnist"), note
    return _read(clothing), ""


class Piece(NamedTuple):
    """One seed of a study: all that a process of its own needs to know."""

    study: str
    seed: int
    quick: bool = False
    clothing: str | None = None


def measure(piece: Piece, told: Told | None = None) -> dict[str, Any]:
    """Run a study with one seed; returns what it gave and took as plain data.

    ``told`` is called with 1 after every step of training.
    """
    study = find(piece.study)
    dataset, _ = dataset_for(study, piece.clothing)
    setting = study.quick if piece.quick else study.setting
    began, worked = time.perf_counter(), time.process_time()
    with torch.random.fork_rng(devices=[]):
        found = study.run(setting, Trial(piece.seed, dataset, told))
    return {
        "seed": piece.seed,
        "seconds": round(time.perf_counter() - began, 2),
        "processor_seconds": round(time.process_time() - worked, 2),
        "threads": torch.get_num_threads(),
        **asdict(found),
    }


def conclude(
    study: Study, seeds: list[dict[str, Any]], clothing: str | None, *, quick: bool
) -> dict[str, Any]:
    """Return a study's result of what ``measure`` gave for each seed, as plain data, ready for JSON."""
    dataset, note = dataset_for(study, clothing)
    seeds = sorted(seeds, key=lambda each: each["seed"])
    results = Results([Measured(each["numbers"], each["curves"]) for each in seeds])
    verdict, judged = judge(study.criteria, results)
    return {
        "format": FORMAT,
        "study": study.name,
        "verdict": verdict,
        "quick": quick,
        "criteria": [{**asdict(each), "holds": each.holds} for each in judged],
        "numbers": {name: results.spread(name)._asdict() for name in study.numbers},
        "seeds": seeds,
        "setting": asdict(study.quick if quick else study.setting),
        "data": None if dataset is None else dataset.name,
        "note": note,
        "seconds": round(sum(each["seconds"] for each in seeds), 2),
        "commit": commit(),
        "versions": versions(),
        "machine": {**machine(), "threads": seeds[0]["threads"]},
    }


def results_of(document: dict[str, Any]) -> Results:
    """Read the seeds' results back from a document; ``RunError`` if it is none of ours."""
    try:
        return Results(
            [Measured(_floats(each["numbers"]), _lists(each["curves"])) for each in document["seeds"]]
        )
    except (KeyError, TypeError, AttributeError):
        raise RunError("this is not a study's result") from None


def verdict_of(document: dict[str, Any]) -> Verdict:
    """The verdict that a document states."""
    verdict: Verdict = document["verdict"]
    return verdict


def _floats(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: _float(value) for name, value in numbers.items()}


def _lists(curves: dict[str, list[float | None]]) -> dict[str, list[float]]:
    return {name: [_float(value) for value in values] for name, values in curves.items()}


def _float(value: float | None) -> float:
    """JSON has no NaN: None stands for it."""
    return float("nan") if value is None else float(value)
