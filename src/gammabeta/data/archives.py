"""The two data sets that come as archives: CIFAR-10 (tar) and EMNIST (zip). Nothing is unpacked to disk."""

import gzip
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .dataset import Dataset, Split
from .emnist import upright
from .idx import read_idx_stream
from .stream import Stream, open_stream, open_zip, reason, unpacked_limit

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FOLDER = "cifar-10-batches-bin"
#: One record: a label, then 32×32 of red, of green, of blue.
_RECORD = 1 + 3 * 32 * 32


def read_cifar10(path: Path, *, per_batch: int = 10_000) -> Dataset:
    """Read CIFAR-10's binary version, ``cifar-10-binary.tar.gz`` (the "python" version is a pickle: code).

    Five training batches and a test batch of ``per_batch`` records each, (N, 3, 32, 32).
    """
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    batches: dict[str, npt.NDArray[np.uint8]] = {}
    try:
        with (
            open_stream(path) as stream,
            tarfile.open(fileobj=cast("IO[bytes]", SimpleNamespace(read=stream.some)), mode="r|") as archive,
        ):
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.isreg() and folder == CIFAR10_FOLDER and name in names:
                    batches[name] = _batch(archive, member, path, per_batch)
            while stream.some(1 << 18):
                pass  # gzip's checksum stands at the very end
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not an intact tar file ({reason(error)}); download it again") from None
    missing = [name for name in names if name not in batches]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} not found in it; is it cifar-10-binary.tar.gz?")
    records = np.concatenate([batches[name] for name in names[:-1]])
    train, test = _cifar_split(records), _cifar_split(batches[names[-1]])
    return Dataset("cifar10", train, test, CIFAR10_CLASSES)


def read_emnist_letters(path: Path) -> Dataset:
    """Read the letters of EMNIST from ``gzip.zip``: grey 28×28, 26 classes, both cases in one.

    In the file each image is transposed and labels count from 1; here images are upright and labels count
    from 0.
    """
    with open_zip(path, "zip file", "download it again") as archive:
        train, test = (_emnist_split(archive, path, part) for part in ("train", "test"))
    return Dataset("emnist-letters", train, test, tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def _batch(
    archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, per_batch: int
) -> npt.NDArray[np.uint8]:
    if member.size != per_batch * _RECORD:
        raise DataError(
            f"{path}: {member.name} has {member.size} bytes, not {per_batch * _RECORD}; download it again"
        )
    content = cast("IO[bytes]", archive.extractfile(member)).read()
    if len(content) != member.size:
        raise DataError(f"{path}: {member.name} is cut short; download it again")
    return np.frombuffer(content, np.uint8).reshape(per_batch, _RECORD)


def _cifar_split(records: npt.NDArray[np.uint8]) -> Split:
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return Split(np.ascontiguousarray(images).copy(), records[:, 0].astype(np.int64))


def _emnist_split(archive: zipfile.ZipFile, path: Path, part: str) -> Split:
    images = _emnist_member(archive, path, f"gzip/emnist-letters-{part}-images-idx3-ubyte.gz", 3)
    labels = _emnist_member(archive, path, f"gzip/emnist-letters-{part}-labels-idx1-ubyte.gz", 1)
    return Split(upright(images)[:, np.newaxis], labels.astype(np.int64) - 1)


def _emnist_member(archive: zipfile.ZipFile, path: Path, name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise DataError(f"{path}: {name} not found in it; is it EMNIST's gzip.zip?") from None
    with archive.open(info) as member, gzip.GzipFile(fileobj=member) as unpacked:
        stream = Stream(path / name, unpacked, unpacked_limit(info.file_size), packed=True)
        return read_idx_stream(stream, dimensions)
