"""Contiguous tensors: channels in groups, whose planes lie side by side in every image.

A channel's own planes are scattered over memory in pieces, short ones in a few cache lines that no prefetcher
foresees. A group's are a run of some KiB; so its channels are summed up image by image, and what each has
summed so far stays in working memory, one *account* a channel: sixteen float32 lanes of two sums since the
account was last settled, and the float64 totals. The plan makes groups that fit in a core's cache (``GROUP``
channels); long planes are groups of one.
"""

from .loads import float32, get_f64, prefetch, put_f64
from .simd import inlined, splat

SHIFT = 32  # where an account has the float32 that its lanes are sums about
TOTAL, SQUARES, FIRST = 18, 19, 20  # and its float64
SETTLED = 4096  # values that may be summed in float32

_load, _store = float32.load, float32.store


@inlined
def cut(units, parts, part):
    """The first unit of a part; its end is the first of the next."""
    return units * part // parts


@inlined
def accounts(args, part):
    """Where the accounts of a part's channels begin, one after the other."""
    return args.scratch + part * args.scratch_step


@inlined
def open_account(account, first):
    """All sums zero; ``first`` is what the float64 totals are about."""
    put(account, splat(0.0), splat(0.0))
    put_f64(account, TOTAL, 0.0)
    put_f64(account, SQUARES, 0.0)
    put_f64(account, FIRST, first)


@inlined
def held(account):
    """The two float32 sums."""
    return _load(account, 0), _load(account, 16)


@inlined
def put(account, one, two):
    """Keep the two float32 sums."""
    _store(account, 0, one)
    _store(account, 16, two)


@inlined
def book(account, one, two):
    """Add to the float64 totals."""
    put_f64(account, TOTAL, get_f64(account, TOTAL) + one)
    put_f64(account, SQUARES, get_f64(account, SQUARES) + two)


@inlined
def fetch_next(plane, image, images, step, group, nbytes):
    """Ask for the plane that follows ``images`` apart, or as the first of the next group.

    ``step`` and ``group`` are the bytes from one image, and from one group, to the next.
    """
    further = step if image + 1 < images else group - image * step
    for line in range(0, nbytes + 63, 64):
        prefetch(plane + further + line)
