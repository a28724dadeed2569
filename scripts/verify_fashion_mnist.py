"""Compute the SHA-256 sums of the original Fashion-MNIST files from Debian's package.

    python scripts/verify_fashion_mnist.py FOLDER

FOLDER is usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist. Debian changed nothing
but the first bytes of each gzip file: it took out the file's name and put in another time. With the
original name and time back in place, each file must have exactly the SHA-256 that `gammabeta.data` pins,
which shows that the pinned sums are those of this content. The times were found by trying each second of
August 2017, when the data were published.
"""

import hashlib
import struct
import sys
from pathlib import Path

from gammabeta.data.catalog import FASHION_FILES

#: Seconds since 1970, as the original gzip headers have them: 2017-08-31, 10:50 UTC.
TIMES = {"train": 1504176606, "t10k": 1504176627}
_HEADER = 10  # bytes of a gzip header without a name


def original(name: str, packed: bytes) -> bytes:
    """The original file ``name`` (without .gz), from Debian's ``packed`` one."""
    time = TIMES[name.partition("-")[0]]
    # magic, deflate, "a name follows", the time, no extra flags, Unix
    header = struct.pack("<2sBBIBB", b"\x1f\x8b", 8, 8, time, 0, 3)
    return header + name.encode() + b"\0" + packed[_HEADER:]


def main() -> int:
    """Run the script."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    wrong = 0
    for file in FASHION_FILES:
        path = Path(sys.argv[1]) / file.name
        if not path.is_file():
            print(
                f"error: {path}: no such file; unpack Debian's dataset-fashion-mnist there", file=sys.stderr
            )
            return 2
        content = original(file.name.removesuffix(".gz"), path.read_bytes())
        same = hashlib.sha256(content).hexdigest() == file.sha256 and len(content) == file.size
        wrong += not same
        print(f"{'as pinned' if same else 'DIFFERENT'}  {file.sha256}  {file.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
