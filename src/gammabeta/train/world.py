"""The processes that train one network together: who they are, what each does, what they agree on.

``torchrun`` starts them and describes them in the environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR``, ``MASTER_PORT``). Together they take the very steps that one process would: a recipe's batch
size is that of all ranks together, and each step's images are shared out. Rank 0 alone reads and writes the
run folder and speaks; it tells the others what to do.
"""

import inspect
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import GammabetaError, RunError, UnavailableError, UsageError
from .device import resolve_device


class AnotherFailed(Exception):  # noqa: N818 -- not an error of this process
    """Another rank has failed and said why: this one ends without a word."""

    exit_code = 1


@dataclass(frozen=True)
class World:
    """The ranks of a training, or this process alone.

    Attributes:
        rank: This process, from 0.
        size: Number of processes on all machines.
        local_rank: This process on its machine, from 0: the number of its GPU.
        store: Where the ranks leave each other notes, also when no collective works any more.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's share of ``count`` images: in order, sizes differ by one at most, perhaps empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def device(self, name: str) -> str:
        """The device for this rank, of ``auto``, ``cpu`` or ``cuda``: the GPU of its local rank.

        Raises:
            UsageError: One GPU was named for all.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise UsageError(f"{self.size} processes cannot share device {name!r}: use --device cuda or cpu")
        return f"cuda:{self.local_rank}"

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model as it is called in training: its gradients are averaged over the ranks."""
        if self.size == 1:
            return model
        options: dict[str, Any] = {"device_ids": [device.index] if device.type == "cuda" else None}
        # Running statistics are the same on all ranks already. PyTorch 2.13 renamed the option.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        return DistributedDataParallel(model, **options)

    def total(self, figures: Tensor) -> Tensor:
        """The sum of all ranks' figures."""
        if self.size > 1:
            dist.all_reduce(figures)
        return figures

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order."""
        everyone = [value]
        if self.size > 1:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, value)
        return everyone

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def first_to_fail(self) -> bool:
        """Take note of a failure of this rank; whether it is the first, and so the one to say why."""
        try:
            return self.store is None or int(self.store.add("failures", 1)) == 1
        except RuntimeError:  # whoever kept the notes has gone: better say it twice than not at all
            return True


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Meet the processes that ``torchrun`` has started, if there are any, and part from them at the end.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: The environment names other processes, but not this one among them.
        GammabetaError: Whatever was raised inside, on the rank where it happened first.
        AnotherFailed: The same on all other ranks.
    """
    size = _number("WORLD_SIZE", 1)
    if size < 2:
        yield ALONE
        return
    for name in ("RANK", "LOCAL_RANK"):
        _number(name)
    names: Any = dist  # whose type stubs leave out two public names
    meeting = names.rendezvous("env://")
    # torchrun's store outlives the workers: addresses of those that died must not be found in it.
    attempt = f"gammabeta/{_number('TORCHELASTIC_RESTART_COUNT', 0)}/{size}"
    store = names.PrefixStore(attempt, next(meeting)[0])
    world = World(_number("RANK"), size, _number("LOCAL_RANK"), store)
    try:
        place = resolve_device(world.device(device))
        _settle(place)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=size)
        yield world
    except GammabetaError as error:
        if not world.first_to_fail():
            raise AnotherFailed from None
        raise type(error)(f"rank {world.rank}: {error}") from None
    except RuntimeError as error:
        lost = _is_lost_connection(error)
        if not world.first_to_fail() and lost:
            raise AnotherFailed from None
        if not lost:
            raise
        raise RunError(
            f"rank {world.rank}: the connection to another process is lost; has it died?"
        ) from None
    except Exception:
        world.first_to_fail()
        raise
    dist.destroy_process_group()


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UsageError(f"WORLD_SIZE is set but {name} is {text!r}: start several processes with torchrun")
    return int(text)


def _settle(place: torch.device) -> None:
    """Take this process's share of the machine: its GPU or its cores, and the way to its neighbours."""
    local_size = _number("LOCAL_WORLD_SIZE", 1)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    elif not dist.is_gloo_available():
        raise UnavailableError("this PyTorch was built without gloo, by which processes on CPUs talk")
    # torchrun gives every process one thread where nobody has chosen; share out the cores instead.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))
    # On one machine, talk over the loopback: the name of the host may lead nowhere, in a container say.
    if local_size == _number("WORLD_SIZE", 1):
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
