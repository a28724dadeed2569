"""How a tensor is cut into tiles and programs: plain arithmetic, cached, no measuring while a user waits.

The reasoning, and the numbers it rests on, is in docs/design/gpu.md. In short: a thread of a program of 4
warps has 64 bytes in flight over the tensors it reads, in 16-byte loads where alignment allows; a reduction
has about four programs per multiprocessor, whatever the shape; a channel that is small enough stays with one
program, which then reads it again from cache.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

PROGRAMS_PER_SM = 4
REDUCTION_REGISTERS = 128  # of 65,536 on a multiprocessor: four programs of 128 threads find room
MAX_SPLITS = 1024
OWNED_TILES = 8
WARPS = 4
OWNED_WARPS = 8


class Chip(NamedTuple):
    """What the plan needs to know of a device: multiprocessors and bytes of second-level cache."""

    multiprocessors: int
    cache_bytes: int


class View(NamedTuple):
    """A tensor as ``(N, C, S)``, or with ``rows`` as ``(N, S, C)``, ``S = H * W`` if it is to be pooled."""

    N: int
    C: int
    S: int
    H: int
    W: int
    pool: int
    rows: bool
    itemsize: int


@dataclass(frozen=True, eq=False)
class Tiling:
    """Tiles of ``BC`` channels by ``BN`` images by ``BS`` cells, and what the kernels specialise on."""

    view: View
    rows_of_cells: int
    cols: int
    BC: int
    BN: int
    BS: int
    VEC: int
    warps: int

    @property
    def cells(self) -> int:
        """Cells per image: positions, or 2 x 2 squares of them."""
        return self.rows_of_cells * self.cols

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return -(-self.view.C // self.BC)

    @property
    def tiles(self) -> int:
        """Tiles per block of channels."""
        return -(-self.view.N // self.BN) * -(-self.cells // self.BS)

    @property
    def wide(self) -> bool:
        """Whether offsets inside one tile need 64 bits."""
        v = self.view
        reach = v.S if v.pool == 2 else min(self.BS, v.S)
        span = (self.BN - 1) * v.C * v.S + (reach * v.C if v.rows else (self.BC - 1) * v.S + reach)
        return span >= 2**31

    @cached_property
    def extents(self) -> tuple[int, ...]:
        """The kernels' ``N, C, S, H, W, cells, cols``."""
        v = self.view
        return v.N, v.C, v.S, v.H, v.W, self.cells, self.cols

    @cached_property
    def shape(self) -> dict[str, Any]:
        """The kernels' compile-time arguments that describe a tile, and the compiler's options.

        ``enable_fp_fusion``: z must come out the same forward and backward; Triton's default is about to
        change.
        """
        return {
            "ROWS": self.view.rows,
            "VEC": self.VEC,
            "WIDE": self.wide,
            "BC": self.BC,
            "BN": self.BN,
            "BS": self.BS,
            "num_warps": self.warps,
            "enable_fp_fusion": True,
        }


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=4096)
def view_of(shape: tuple[int, ...], rows: bool, pool: int | None, itemsize: int) -> View:
    """``(N, C, *spatial)`` seen as three axes.

    Without a pool, channels_last rows count as one long image; so does a single channel, which has no other.
    """
    n, c, spatial = shape[0], shape[1], shape[2:]
    if pool == 2:
        return View(n, c, prod(spatial), spatial[0], spatial[1], 2, rows, itemsize)
    if rows or c == 1:
        return View(1, c, n * prod(spatial), 1, 1, 1, c > 1, itemsize)
    return View(n, c, prod(spatial), 1, 1, 1, False, itemsize)


def _vector(view: View) -> int:
    """Neighbouring values that one 16-byte load may fetch: as many as divide the contiguous extent."""
    return gcd(view.C if view.rows else view.S, 16 // view.itemsize)


def _elements(view: View, tensors: int, warps: int) -> int:
    """Cells per tile: a thread has 64 bytes in flight, in at most 16 loads, over the tensors it reads.

    More would be held in more registers than a multiprocessor has for its programs. A pooled cell has four
    corners, and their loads are one value each where corners do not lie side by side.
    """
    vector = 1 if view.pool == 2 and not view.rows else _vector(view)
    per_thread = min(64 // view.itemsize, 16 * vector) // min(tensors, 2)
    return per_thread * 32 * warps // (2 if view.pool == 2 else 1)


def _tiling(view: View, cells_shape: tuple[int, int], elements: int, channels: int, warps: int) -> Tiling:
    """Tiles of about ``elements`` cells, ``channels`` side by side (fewer where C is less)."""
    cells = cells_shape[0] * cells_shape[1]
    BC = min(power_of_two(view.C), channels)
    room = max(1, elements // BC)
    BS = min(power_of_two(cells), room)
    if (
        cells > BS
    ):  # several chunks per image: of the sizes that nearly fill the room, the one with least padding
        BS = min((room, room // 2, room // 4), key=lambda b: -(-cells // b) * b if b else cells * cells)
    BN = min(power_of_two(view.N), max(1, room // BS))
    return Tiling(view, *cells_shape, BC, BN, BS, _vector(view), warps)


def _cells_shape(view: View, odd_edges: bool) -> tuple[int, int]:
    """Rows and columns of cells; with ``odd_edges`` the cells that an odd edge cuts off count too."""
    if view.pool == 1:
        return 1, view.S
    return (-(-view.H // 2), -(-view.W // 2)) if odd_edges else (view.H // 2, view.W // 2)


@lru_cache(maxsize=4096)
def tile(view: View, tensors: int, odd_edges: bool) -> Tiling:
    """Tiles for kernels whose programs share a channel and read ``tensors`` tensors.

    Side by side lie as many channels as make long contiguous runs: a row of up to 256 in channels_last; in
    ``(N, C, S)`` enough planes to fill the tile, which then is one contiguous piece where ``S`` is a power of
    two.
    """
    cells = _cells_shape(view, odd_edges)
    elements = _elements(view, tensors, WARPS)
    channels = 256 if view.rows else max(1, elements // power_of_two(cells[0] * cells[1]))
    return _tiling(view, cells, elements, channels, WARPS)


@lru_cache(maxsize=4096)
def splits(tiling: Tiling, chip: Chip) -> int:
    """Programs per block of channels in a reduction: enough to fill the chip, at most one a tile."""
    wanted = -(-PROGRAMS_PER_SM * chip.multiprocessors // max(1, tiling.blocks))
    return max(1, min(wanted, tiling.tiles, MAX_SPLITS))


@lru_cache(maxsize=4096)
def owned(view: View, tensors: int, chip: Chip) -> Tiling | None:
    """Tiles for one program per block of channels that reduces it and then reads it again, or None.

    Worth it in two cases. The channel blocks that are being worked on at one time (``tensors`` of them each)
    fit in half the second-level cache and there are enough to fill the chip: the second reading is then free.
    Or a program has only a few tiles to go through: one launch then costs less than three.
    """
    cells = _cells_shape(view, odd_edges=True)
    run = 64 // view.itemsize  # values in the two 32-byte sectors that a run should at least fill
    channels = run if view.rows else power_of_two(-(-run // view.S))
    tiling = _tiling(view, cells, _elements(view, 2, OWNED_WARPS), channels, OWNED_WARPS)
    at_once = min(tiling.blocks, 2 * chip.multiprocessors)
    footprint = at_once * tiling.BC * view.N * view.S * view.itemsize * tensors
    fills = tiling.blocks >= chip.multiprocessors and footprint <= chip.cache_bytes // 2
    return tiling if fills or tiling.tiles <= OWNED_TILES else None
