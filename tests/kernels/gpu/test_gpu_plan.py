"""How the work is cut: every value once, no tile too large, offsets right beyond 2^31; and who is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gammabeta.epilogue import Epilogue, MaxPool
from gammabeta.kernels.backend import unfit

triton = pytest.importorskip("triton")
tl = triton.language
plan = pytest.importorskip("gammabeta.kernels.gpu.plan")
tiles = pytest.importorskip("gammabeta.kernels.gpu.tiles")

H100 = plan.Chip(132, 50 << 20)
RESNET = [(n, c, s, s) for n in (64, 256) for c, s in ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))]


def views():
    spatial = st.lists(st.integers(1, 80), min_size=0, max_size=3)
    return st.builds(
        lambda n, c, s, rows, size: plan.view_of((n, c, *s), rows, None, size),
        st.integers(1, 300),
        st.integers(1, 5000),
        spatial,
        st.booleans(),
        st.sampled_from([2, 4]),
    )


@given(views(), st.integers(1, 3))
def test_tiles_cover_all_and_stay_small(view, tensors):
    t = plan.tile(view, tensors, True)
    assert t.blocks * t.BC >= view.C > (t.blocks - 1) * t.BC
    assert t.tiles * t.BN * t.BS >= view.N * view.S
    for extent in (t.BC, t.BN, t.BS):
        assert extent & (extent - 1) == 0, "Triton's tiles are powers of two"
    values = t.BC * t.BN * t.BS * view.itemsize * min(tensors, 2)
    assert values <= 64 * 32 * t.warps, "more than 64 bytes a thread"
    assert (view.C if view.rows else view.S) % t.VEC == 0


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "shape", [*RESNET, (1, 1, 4096, 4096), (1 << 20, 3), (1 << 16, 1), (8, 32, 32, 64, 64)]
)
def test_reductions_fill_the_chip(shape, rows):
    """Whatever N, C and S: three programs per multiprocessor, or a tile each, or the channel in cache."""
    view = plan.view_of(shape, rows or len(shape) == 2, None, 2)
    t = plan.tile(view, 1, False)
    programs = t.blocks * plan.splits(t, H100)
    assert plan.owned(view, 1, H100) or programs >= 3 * H100.multiprocessors or programs == t.blocks * t.tiles


def test_channels_stay_whole_where_the_cache_holds_them():
    """Stages 3 and 4 of ResNet-50 at batch 64, contiguous: one launch and the fewest bytes there can be."""
    for shape, whole in (((64, 1024, 14, 14), True), ((64, 2048, 7, 7), True), ((64, 64, 56, 56), False)):
        assert (plan.owned(plan.view_of(shape, False, None, 2), 1, H100) is not None) is whole
    assert plan.owned(plan.view_of((64, 128), True, None, 2), 1, H100) is not None, (
        "a small batch: one launch"
    )


locate = tiles.locate


@triton.jit
def write_offsets(
    out_ptr, q, c0, corner, N, C, S, H, W, cells, cols,
    POOL: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    # One program per tile asked for: q and c0 are numbers a launch would compute.
    first = q + tl.program_id(0)
    block = c0 + tl.program_id(0)
    start, offsets, mask = locate(
        first, block, corner, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS
    )
    place = tl.arange(0, BC)[:, None] * (BN * BS) + tl.arange(0, BN * BS)[None, :]
    tl.store(out_ptr + place, start + offsets, mask=mask)


def true_offset(t, q, c, r, corner):
    """Where value ``r`` of channel ``c`` in tile ``q`` lies, by Python's integers; -1 outside the tensor."""
    v, chunks = t.view, -(-t.cells // t.BS)
    n, cell = q // chunks * t.BN + r // t.BS, q % chunks * t.BS + r % t.BS
    y, x = 0, cell
    if v.pool == 2:
        y, x = 2 * (cell // t.cols) + corner // 2, 2 * (cell % t.cols) + corner % 2
        if y >= v.H or x >= v.W:
            return -1
    if n >= v.N or cell >= t.cells or c >= v.C:
        return -1
    position = y * v.W + x if v.pool == 2 else cell
    return n * v.C * v.S + (position * v.C + c if v.rows else c * v.S + position)


@pytest.mark.parametrize(
    ("shape", "rows", "pool"),
    [
        ((70000, 64, 32, 32), False, None),  # 4.6e9 values
        ((70000, 64, 32, 32), True, None),
        ((70000, 64, 32, 32), False, 2),
        ((70000, 64, 31, 33), True, 2),
        ((2, 3, 50000, 50000), False, None),  # one plane passes 2^31
        ((3, 1, 2**31 - 5), False, None),  # an extent so near to 2^31 that rounding it up would pass it
        ((2**31 - 5, 2), True, None),
        ((2, 3, 50001, 50001), False, 2),
        ((2, 3, 50001, 50000), True, 2),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_offsets_beyond_two_to_the_31(device, shape, rows, pool, share):
    """First tiles, some beyond the middle, and the last, of tensors that no test could allocate."""
    t = plan.tile(plan.view_of(shape, rows, pool, 2), 1, True)
    q = int(share * (t.tiles - 1))
    c0 = int(share * (t.blocks - 1)) * t.BC
    largest = 0
    for corner in range(t.view.pool**2):
        out = torch.full((t.BC, t.BN * t.BS), -1, dtype=torch.int64, device=device)
        write_offsets[(1,)](out, q, c0, corner, *t.extents, POOL=t.view.pool, **t.shape)
        places = [(i, r) for i in range(t.BC) for r in range(0, t.BN * t.BS, 37)]
        found = [int(out[i, r]) for i, r in places]
        assert found == [true_offset(t, q, c0 + i, r, corner) for i, r in places]
        largest = max(largest, *found)
    assert share == 0.0 or largest >= 2**31


def test_refusals_say_why(gpu, device):
    x = torch.randn(4, 3, 8, 8, device=device)
    assert gpu.unsupported(x, None, Epilogue("relu", 2)) is None
    for why, (tensor, residual, pool) in {
        "float64": (x.double(), None, None),
        "empty": (x[:0], None, None),
        "channels": (x.reshape(-1), None, None),
        "pooling": (x, None, 3),
        "four dimensions": (x[:, :, 0], None, 2),
        "no max pooling": (x, None, MaxPool(2, 2)),
        "shape": (x, x[:, :, :1], None),
        "dtype": (x, x.half(), None),
    }.items():
        assert why in (
            unfit(tensor, residual, pool) or gpu.unsupported(tensor, residual, Epilogue(None, pool))
        )


def test_old_or_foreign_devices_are_refused(gpu, monkeypatch):
    """What a machine would say that is not here: asked of the function that decides."""
    decide = gpu._unfit_device.__wrapped__
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert decide(cuda) == "Tesla T4 has compute capability 7.5; Triton needs 8.0 (Ampere) or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert decide(cuda) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in decide(cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in decide(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in decide(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ".to('cuda')" in decide(torch.device("cpu"))
