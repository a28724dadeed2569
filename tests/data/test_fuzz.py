"""A few hundred damaged files of each format: accepted, or refused in one line, and nothing else.

`scripts/fuzz_inputs.py` does the same ten thousand times and watches time and memory too.
"""

import gzip
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gammabeta.data import read_idx
from gammabeta.errors import DataError, GammabetaError

COUNT, SEED = 150, 20150211
DATA = (
    "IDX images",
    "IDX labels",
    "IDX gzip",
    "IDX gzip, repacked",
    "NPZ",
    "NPZ, rezipped",
    "PNG",
    "PNG, checksums repaired",
    "JPEG",
    "GIF",
    "BMP",
    "WEBP",
    "CSV",
)


@pytest.fixture(scope="module")
def fuzz(script):
    return script("fuzz_inputs")


@pytest.mark.parametrize("name", DATA)
def test_damaged_files_are_accepted_or_refused(name, fuzz, tmp_path):
    kind = fuzz.FORMATS[name]
    samples, read = kind.samples(tmp_path), kind.reader(tmp_path)
    outcomes = {"accepted": 0, "refused": 0}
    for number in range(COUNT):
        outcome, message = fuzz.judge(read, kind.case(samples, SEED, number))
        assert outcome != "failed", f"input {number}: {message}"
        outcomes[outcome] += 1
    assert outcomes["refused"] > COUNT / 4  # else the damage does not reach what is read


@pytest.mark.parametrize("name", DATA)
def test_undamaged_samples_are_accepted(name, fuzz, tmp_path):
    kind = fuzz.FORMATS[name]
    read = kind.reader(tmp_path)
    for sample in kind.samples(tmp_path):
        assert fuzz.judge(read, kind.seal(sample)) == ("accepted", "")


def test_the_same_number_is_the_same_input(fuzz, tmp_path):
    kind = fuzz.FORMATS["PNG"]
    samples = kind.samples(tmp_path)
    inputs = [kind.case(samples, SEED, number) for number in range(20)]
    assert inputs == [kind.case(samples, SEED, number) for number in range(20)]
    assert len(set(inputs)) == 20
    assert not set(inputs) & set(samples)


def test_judge_tells_failures(fuzz):
    def crash(_):
        raise KeyError("oops")

    def refuse(_):
        raise GammabetaError("one line")

    def ramble(_):
        raise GammabetaError("two\nlines")

    assert fuzz.judge(crash, b"")[0] == "failed"
    assert fuzz.judge(refuse, b"") == ("refused", "one line")
    assert fuzz.judge(ramble, b"")[0] == "failed"
    assert fuzz.judge(lambda content: content, b"") == ("accepted", "")


def test_repaired_checksums_are_right(fuzz, tmp_path):
    sample = fuzz.FORMATS["PNG"].samples(tmp_path)[0]
    broken = bytearray(sample)
    (length,) = struct.unpack_from(">I", broken, 8)
    broken[16] ^= 1
    repaired = fuzz.seal_png(bytes(broken))
    assert struct.unpack_from(">I", repaired, 16 + length)[0] == zlib.crc32(repaired[12 : 16 + length])
    assert fuzz.seal_png(sample) == sample


def test_damaged_json_is_json(fuzz):
    content = json.dumps({"a": [1, 2, {"b": "c"}], "d": 1.5}).encode()
    for number in range(100):
        json.loads(fuzz.damage_json(content, np.random.default_rng(number)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 6), min_size=0, max_size=5),
    kind=st.integers(0, 255),
    body=st.binary(max_size=150),
    packed=st.booleans(),
)
def test_any_idx_header_is_believed_only_if_true(shape, kind, body, packed, tmp_path: Path):
    content = struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + body
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if packed else content)
    true = kind == 8 and len(shape) == 3 and all(shape) and np.prod(shape, dtype=object) == len(body)
    if true:
        items = read_idx(path, dimensions=3)
        assert items.shape == tuple(shape)
        assert items.tobytes() == body
    else:
        with pytest.raises(DataError, match=r"\A[^\n]+\Z"):
            read_idx(path, dimensions=3)
