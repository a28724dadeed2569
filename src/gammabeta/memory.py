"""How much memory is free, before it is asked for, and one line for when there was not enough."""

import os
import re
from contextlib import suppress
from pathlib import Path

_GROUPS = (  # a container's limit and use: version 2 of Linux control groups, and version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_REFUSED = re.compile(
    r"can't allocate memory|not enough memory|out of memory|failed to allocate", re.IGNORECASE
)


def available() -> int | None:
    """Bytes that this process may still take: by machine, container and its own limit; None: unknown."""
    rooms = [room for room in (_machine(), *map(_group, _GROUPS), _limit()) if room is not None]
    return max(0, min(rooms)) if rooms else None


def lacking(need: float, share: float = 0.9) -> str | None:
    """Say in words how much ``need`` bytes are and how much is free, if it is more than ``share`` of that."""
    free = available()
    if free is None or need <= share * free:
        return None
    return f"about {size(need)} of memory, and {size(free)} are free"


def size(count: float) -> str:
    """``count`` bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def out_of_memory(error: BaseException) -> str | None:
    """One line about an error that says that memory ran out, on the host or a GPU; None for any other."""
    words = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and _REFUSED.search(words)
    ):
        return None
    free = available()
    left = "" if free is None else f" ({size(free)} are free)"
    return f"out of memory{left}: use smaller pictures (--image-size), smaller batches, or fewer at a time"


def _machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    with suppress(OSError, ValueError, AttributeError):  # macOS: all there is, in use or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group(names: tuple[str, str]) -> int | None:
    with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
        limit, used = (int((Path("/sys/fs/cgroup") / name).read_text("ascii")) for name in names)
        return limit - used
    return None


def _limit() -> int | None:
    """What ``ulimit -v`` leaves."""
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            return limit - pages * resource.getpagesize()
    return None
