"""How much memory is free, before it is asked for, and one line for when there was not enough."""

import os
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_NAMES = (  # a container's or a job's limit and use: version 2 of Linux control groups, and version 1
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available() -> int | None:
    """Bytes that this process may still take: by machine, container and its own limit; None: unknown."""
    rooms = [room for room in (_machine(), *_groups(), _limit()) if room is not None]
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


def _machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    with suppress(OSError, ValueError, AttributeError):  # macOS: all there is, in use or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _groups() -> list[int]:
    """What each control group of this process leaves; cached files give way, so they count as free."""
    places = {_GROUPS, _GROUPS / "memory"}
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text("ascii").splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "memory"):
                below = _GROUPS / kinds / path.lstrip("/")
                places |= {below, *(parent for parent in below.parents if _GROUPS in parent.parents)}
    found = []
    for place in places:
        for names in _NAMES:
            with suppress(OSError, ValueError):  # ValueError: "max", which is no limit
                limit, used = (int((place / name).read_text("ascii")) for name in names)
                pairs = (line.split() for line in (place / "memory.stat").read_text("ascii").splitlines())
                cached = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
                reclaimed = cached.get("total_inactive_file", cached.get("inactive_file", 0))
                found.append(limit - used + reclaimed)
    return found


def _limit() -> int | None:
    """What ``ulimit -v`` leaves."""
    with suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            return limit - pages * resource.getpagesize()
    return None
