"""The kernels that are shipped as LLVM's IR: they are those that Numba would make, or are not used."""

import json
import lzma
import re

import llvmlite.binding as llvm
import pytest

from gammabeta.kernels.cpu import compiler, prepared
from gammabeta.kernels.cpu.registry import Key
from scripts import prepare_kernels

HERE = llvm.get_process_triple()
content = json.loads(lzma.decompress(prepared.FILE.read_bytes()))
needs_this_machine = pytest.mark.skipif(
    content["triple"] != HERE, reason=f"the file is for {content['triple']}"
)


@pytest.fixture(autouse=True)
def nothing_remembered():
    prepared._texts.cache_clear()
    yield
    prepared._texts.cache_clear()


def test_file_was_made_from_these_kernels():
    assert content["sources"] == prepared.digest(), "run: python -m scripts.prepare_kernels"
    wanted = {key.slug for key in prepare_kernels.KEYS}
    wanted |= {f"{key.slug}-rounding" for key in prepare_kernels.KEYS if key.bf16}
    assert content["texts"].keys() == wanted


def test_texts_hold_nothing_of_the_process_that_wrote_them():
    for name, text in content["texts"].items():
        assert not re.search(r"inttoptr \(i64 \d{6,}|@Py|@numba|@NRT", text), name
        assert not re.search(r"(?:/[\w.-]+){3,}", text), name  # a path of some machine


@needs_this_machine
@pytest.mark.parametrize(
    "key", [Key("finish_gradients"), Key("channels_first_train", activation="relu"), Key("work")], ids=str
)
def test_machine_code_is_what_numba_leads_to(key, monkeypatch):
    assert prepared.find(key, llvm) is not None
    with_file = compiler.machine_code(key)
    monkeypatch.setattr(prepared, "find", lambda key, llvm: None)
    assert _instructions(with_file) == _instructions(compiler.machine_code(key))


def _instructions(code):
    """The text section of an object file; names of Numba's are numbered anew in each process."""
    file = llvm.ObjectFileRef.from_data(code)
    return [section.data() for section in file.sections() if section.is_text()]


@pytest.mark.parametrize("change", ["sources", "triple"])
def test_file_of_other_kernels_or_machines_is_not_used(change, tmp_path, monkeypatch):
    file = tmp_path / "prepared.xz"
    file.write_bytes(lzma.compress(json.dumps(content | {change: "other"}).encode()))
    monkeypatch.setattr(prepared, "FILE", file)
    assert prepared.find(Key("work"), llvm) is None


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_damaged_file_is_not_used(damage, tmp_path, monkeypatch):
    file = tmp_path / "prepared.xz"
    file.write_bytes(damage)
    monkeypatch.setattr(prepared, "FILE", file)
    assert prepared.find(Key("work"), llvm) is None
    file.unlink()
    prepared._texts.cache_clear()
    assert prepared.find(Key("work"), llvm) is None


def test_text_that_this_llvm_cannot_read_is_not_used(tmp_path, monkeypatch):
    file = tmp_path / "prepared.xz"
    texts = {"work-f32-linear": "define nothing"}
    file.write_bytes(lzma.compress(json.dumps(content | {"triple": HERE, "texts": texts}).encode()))
    monkeypatch.setattr(prepared, "FILE", file)
    assert prepared.find(Key("work"), llvm) is None
