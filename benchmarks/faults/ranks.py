"""The faults that only several processes can have, between two processes on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gammabeta.doctor import diagnose

from .injections import STALE, Fault, Inject, run_batches
from .subjects import Subject, digits, mlp, train

WORLD = 2


def _healthy(subject: Subject, _seed: int) -> Subject:
    return subject


def _small_batches(subject: Subject, _seed: int) -> Subject:
    return subject.copy(batch=12)


def _own_batches(subject: Subject, _seed: int) -> Subject:
    """As without a broadcast of buffers: each process averages what it alone has seen."""
    half = len(subject.inputs) // WORLD
    mine = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    assert subject.targets is not None
    own = Subject("mine", subject.model, subject.inputs[mine], subject.targets[mine])
    run_batches(own, 4)
    return subject


CASES: list[tuple[Fault | None, Inject]] = [
    (None, _healthy),
    (
        Fault(
            "plain layers, twelve samples per process",
            "unsynchronized-replicas",
            "warning",
            _small_batches,
            frozenset({"train-eval-gap", "tiny-batch"}),
        ),
        _small_batches,
    ),
    (
        Fault("each process its own average", "rank-divergence", "warning", _own_batches, STALE),
        _own_batches,
    ),
]


def run(seed: int) -> Iterator[tuple[Fault | None, frozenset[tuple[str, str]]]]:
    """What the first process's diagnosis finds in each case."""
    torch.manual_seed(1000 + seed)
    images, labels = digits()
    model = mlp()
    train(model, images[:2048], labels[:2048])
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        mp.spawn(_worker, (folder, seed), nprocs=WORLD)  # type: ignore[attr-defined,no-untyped-call]
        found = torch.load(Path(folder) / "found.pt", weights_only=True)
    for (fault, _), fired in zip(CASES, found, strict=True):
        yield fault, frozenset((check, severity) for check, severity in fired)


def _worker(rank: int, folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    images, labels = digits()
    found = []
    for _, inject in CASES:
        model = mlp()
        model.load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True))
        share = slice(2048 + rank, None, WORLD)
        subject = inject(Subject("mlp", model.eval(), images[share], labels[share]), seed)
        assert subject is not None
        report = diagnose(subject.model, subject.loader(), loss=subject.loss)
        found.append([(finding.check, finding.severity) for finding in report])
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
