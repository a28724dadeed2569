"""Where a training runs: the device, the precision, and the processes that train one network together.

``torchrun`` starts several processes and describes them in the environment (``RANK``, ``WORLD_SIZE``,
``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``). Together they take the same steps that one process would: a
recipe's batch size is that of all ranks together, and each step's images are divided among them. Only rank 0
reads and writes the run folder and prints; it tells the others what to do.
"""

import inspect
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import GammabetaError, RunError, UnavailableError, UsageError

Precision = Literal["fp32", "bf16"]


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device for ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<index>``.

    Raises:
        UsageError: The name is none of these.
        UnavailableError: CUDA was asked for and is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UsageError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:<index>")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "no usable GPU was found" if torch.version.cuda else "this PyTorch was built without CUDA"
        raise UnavailableError(f"device {name} is not available: {why}; use --device cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise UnavailableError(f"device {name} does not exist: there are {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def computes_bf16(device: torch.device) -> bool:
    """Tell whether the processor multiplies in bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(capable())


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """Return the precision for ``auto`` (bf16 where the device computes in it), ``fp32`` or ``bf16``."""
    if wanted not in ("auto", "fp32", "bf16"):
        raise UsageError(f"unknown precision {wanted!r}: choose auto, fp32 or bf16")
    return "bf16" if wanted == "bf16" or (wanted == "auto" and computes_bf16(device)) else "fp32"


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, its convolutions in channels_last, the layout they are quickest in."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class AnotherFailed(Exception):  # noqa: N818 -- not an error of this process
    """Another rank has failed and said why: this one ends and prints nothing."""

    exit_code = 1


@dataclass(frozen=True)
class World:
    """The ranks of a training, or this process alone."""

    rank: int = 0  # this process
    size: int = 1  # number of processes on all machines
    local_rank: int = 0  # this process on its machine: the number of its GPU
    store: Any = None  # where the ranks leave notes for each other, also when no collective works any more

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's share of ``count`` images: in order, sizes differ by one at most, perhaps empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def device(self, name: str) -> str:
        """The device of this rank for ``auto``, ``cpu`` or ``cuda``, which is its local rank's GPU."""
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

    def all_reduce(self, figures: Tensor) -> Tensor:
        """Sum ``figures`` over all ranks, in place, and return them."""
        if self.size > 1:
            dist.all_reduce(figures)
        return figures

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks."""
        everyone = [value]
        if self.size > 1:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, value)
        return everyone

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def first_to_fail(self) -> bool:
        """Record a failure of this rank; return whether it is the first one, which says why."""
        try:
            return self.store is None or int(self.store.add("failures", 1)) == 1
        except RuntimeError:  # the process with the store has ended: say it twice rather than not at all
            return True


ALONE = World()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that ``torchrun`` has started, if there are any, and leave them at the end.

    Raises:
        UsageError: The environment names other processes, but not this one among them.
        GammabetaError: Whatever was raised inside, on the rank where it happened first.
        AnotherFailed: The same on all other ranks.
    """
    size = _number("WORLD_SIZE", 1)
    if size < 2:
        yield ALONE
        return
    rank, local_rank = _number("RANK"), _number("LOCAL_RANK")
    world = World(rank, size, local_rank, _meet(rank, size))
    try:
        place = resolve_device(world.device(device))
        _set_up(place)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=world.store, rank=world.rank, world_size=size)
        yield world
    except GammabetaError as error:
        if not world.first_to_fail():
            raise AnotherFailed from None
        raise type(error)(f"rank {world.rank}: {error}") from None
    except AnotherFailed:
        raise
    except Exception as error:
        first = world.first_to_fail()
        in_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
        if not (in_gloo or isinstance(error, dist.DistError)):
            raise
        if not first:
            raise AnotherFailed from None
        lost = f"rank {world.rank}: the connection to another process is lost; has it died?"
        raise RunError(lost) from None
    dist.destroy_process_group()


def _meet(rank: int, size: int) -> Any:
    """Return the store of the processes; ``UsageError`` if the environment does not lead to it."""
    _number("MASTER_PORT")
    address = os.environ.get("MASTER_ADDR")
    if not address or rank >= size:
        what = f"RANK is {rank}" if address else "MASTER_ADDR is not set"
        raise UsageError(f"WORLD_SIZE is {size} but {what}: start several processes with torchrun")
    names: Any = dist  # whose type stubs leave out two public names
    try:
        store = next(names.rendezvous("env://"))[0]
    except (dist.DistError, OSError, ValueError) as error:
        port = os.environ["MASTER_PORT"]
        why = str(error).splitlines()[0][:200]
        raise UnavailableError(f"rank {rank} cannot meet the others at {address}:{port}: {why}") from None
    # torchrun's store outlives the workers: addresses of those that died must not be found in it.
    attempt = f"gammabeta/{_number('TORCHELASTIC_RESTART_COUNT', 0)}/{size}"
    return names.PrefixStore(attempt, store)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "not set" if text is None else repr(text)
        raise UsageError(f"WORLD_SIZE is set but {name} is {found}: start several processes with torchrun")
    return int(text)


def _set_up(place: torch.device) -> None:
    """Take this process's part of the machine: its GPU or its cores, and a network interface."""
    local_size = _number("LOCAL_WORLD_SIZE", 1)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    elif not dist.is_gloo_available():
        raise UnavailableError("this PyTorch was built without gloo, which processes on CPUs need")
    # torchrun gives every process one thread unless the user chose a number; divide the cores instead.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))
    # On one machine, use the loopback: the host's name may not resolve, in a container for example.
    if local_size == _number("WORLD_SIZE", 1):
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
