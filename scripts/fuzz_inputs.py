"""Feed damaged files to every reader, and show what becomes of them.

    python scripts/fuzz_inputs.py [--count 10000] [--seed 1] [--only FORMAT]

For each format, small valid files are written, then damaged: bits flipped, bytes overwritten with awkward
values, pieces removed, repeated, moved, inserted. Where a format protects itself with checksums, a second
variant repairs these after the damage, so that what lies behind them is reached. Each damaged file must be
accepted as valid or refused with an error of ours; anything else (a traceback, more than a second, more
than 500 MB, a hang) is a failure and is printed with its number, from which it can be made again: input
NUMBER of format F under seed S is always the same.

Every format is read in a process of its own; its peak memory, Python and libraries included, is what the
table shows. Another format is one more `Format` in `FORMATS`.
"""

import argparse
import gzip
import hashlib
import io
import json
import multiprocessing
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gammabeta.data import load, load_picture, write_idx
from gammabeta.errors import GammabetaError, GammabetaWarning

SECONDS, MEGABYTES, HANG = 1.0, 500.0, 20.0
#: No child may ask the system for more, so that a reader that does is found before the machine stops.
ADDRESS_SPACE = 12 << 30

ENDS = ("no answer", "the process died")

Random = np.random.Generator
Reader = Callable[[bytes], object]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        samples: valid content, made in a folder it may use.
        reader: from a folder it may use to the function that reads content.
        seal: what follows the damage, such as repairing checksums.
        damage: how content is damaged.
    """

    samples: Callable[[Path], list[bytes]]
    reader: Callable[[Path], Reader]
    seal: Callable[[bytes], bytes] = bytes
    damage: Callable[[bytes, Random], bytes] | None = None

    def case(self, samples: list[bytes], seed: int, number: int) -> bytes:
        """Damaged input ``number`` under ``seed``."""
        random = np.random.default_rng([seed, number])
        content = samples[int(random.integers(len(samples)))]
        return self.seal((self.damage or damage_bytes)(content, random))


# --- damage

AWKWARD = [bytes(n) for n in (1, 2, 4, 8)] + [b"\xff" * n for n in (1, 2, 4, 8)]
AWKWARD += [b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\1\0\0", b"\0\0\1\0"]


def damage_bytes(content: bytes, random: Random) -> bytes:
    """One to four changes; half of them near the beginning, where headers are."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        reach = len(data) if random.random() < 0.5 else min(len(data), 64)
        at = int(random.integers(reach)) if reach else 0
        length = int(min(random.integers(1, 65), len(data) - at))
        kind = int(random.integers(8))
        if kind == 0 and data:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 1 and data:
            data[at] = int(random.integers(256))
        elif kind == 2:
            value = AWKWARD[int(random.integers(len(AWKWARD)))]
            data[at : at + len(value)] = value
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[at : at + length] * int(random.integers(1, 20))
        elif kind == 6:
            data[at:at] = random.bytes(length)
        else:
            to = int(random.integers(len(data) - length + 1))
            data[to : to + length] = data[at : at + length]
    return bytes(data)


VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan")]
VALUES += ["", "\0", "x" * 500, [], {}, [[]], [0] * 50]


def damage_json(content: bytes, random: Random) -> bytes:
    """Valid JSON, with a value or two replaced, removed or nested."""
    document = json.loads(content)
    for _ in range(int(random.integers(1, 3))):
        places = list(_places(document))
        if not places:
            break
        holder, key = places[int(random.integers(len(places)))]
        kind = int(random.integers(4))
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder[key], int | float):
            holder[key] = type(holder[key])(holder[key] * 10.0 ** int(random.integers(1, 6)))
        elif kind == 2:
            for _ in range(int(random.integers(1, 200))):
                holder[key] = [holder[key]]
        else:
            holder[key] = VALUES[int(random.integers(len(VALUES)))]
    return json.dumps(document).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from _places(node[key])


# --- checksums


def seal_checkpoint(content: bytes) -> bytes:
    """Write the right checksum into the document of a checkpoint."""
    body = json.loads(content)
    if isinstance(body, dict):
        body.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({**body, "sha256": digest}).encode()
    return content


def damage_line(content: bytes, random: Random) -> bytes:
    """Lines of JSON, the first of them with other values."""
    first, _, others = content.partition(b"\n")
    return damage_json(first, random) + b"\n" + others


def seal_png(content: bytes) -> bytes:
    """Write the right checksum behind each chunk that still has its length."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def seal_npz(content: bytes) -> bytes:
    """Put a damaged array into an intact zip, beside intact ones."""
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in _arrays().items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", content if name == "x_train" else member.getvalue())
    return result.getvalue()


# --- formats: data


def _arrays() -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    labels = np.arange(12) % 3
    return {"x_train": images, "y_train": labels, "x_test": images[:6], "y_test": labels[:6]}


IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def idx_samples(key: str, folder: Path) -> list[bytes]:
    """An IDX file of images or labels."""
    write_idx(folder / "sample", _arrays()[key].astype(np.uint8))
    return [(folder / "sample").read_bytes()]


def packed_idx_samples(folder: Path) -> list[bytes]:
    """A gzip file; its own checksum is damaged with it."""
    return [gzip.compress(content, mtime=0) for content in idx_samples("x_train", folder)]


def idx_reader(key: str, folder: Path) -> Reader:
    """Read the content as one file of four."""
    for other, name in IDX_NAMES.items():
        write_idx(folder / name, _arrays()[other].astype(np.uint8))

    def read(content: bytes) -> object:
        (folder / IDX_NAMES[key]).write_bytes(content)
        return load(folder)

    return read


def npz_samples(folder: Path) -> list[bytes]:
    """NPZ files, stored and packed."""
    path = folder / "sample.npz"
    result = []
    for save in (np.savez, np.savez_compressed):
        save(path, **_arrays())
        result.append(path.read_bytes())
    return result


def npy_samples(_folder: Path) -> list[bytes]:
    """One array of an NPZ file."""
    member = io.BytesIO()
    np.save(member, _arrays()["x_train"])
    return [member.getvalue()]


def csv_samples(folder: Path) -> list[bytes]:
    """With names and without, grey and in colour."""
    random = np.random.default_rng(8)
    rows = [np.column_stack([np.arange(8) % 2, random.integers(0, 256, (8, count))]) for count in (16, 27)]
    texts = ["\n".join(",".join(map(str, row)) for row in table.tolist()) for table in rows]
    return [
        text.encode() for text in (*texts, "label," + ",".join(f"p{n}" for n in range(16)) + "\n" + texts[0])
    ]


def parquet_samples(folder: Path) -> list[bytes]:
    """Pictures as structs and as lists."""
    import pyarrow as arrow
    from pyarrow import parquet

    pixels = np.random.default_rng(9).integers(0, 256, (8, 4, 4), np.uint8)
    pictures = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": "x.png"})
    found = []
    for images in (pictures, pixels.tolist()):
        file = io.BytesIO()
        parquet.write_table(arrow.table({"image": images, "label": [0, 1] * 4}), file)
        found.append(file.getvalue())
    return found


def file_reader(name: str) -> Callable[[Path], Reader]:
    """What reads a data set from a file of this name."""

    def reader(folder: Path) -> Reader:
        def read(content: bytes) -> object:
            (folder / name).write_bytes(content)
            return load(folder / name)

        return read

    return reader


def npz_reader(folder: Path) -> Reader:
    """Read the content as an NPZ file."""

    def read(content: bytes) -> object:
        (folder / "data.npz").write_bytes(content)
        return load(folder / "data.npz")

    return read


def picture_samples(kind: str, _folder: Path) -> list[bytes]:
    """Small pictures in several modes that the format has."""
    grey = np.full((40, 30), 240, np.uint8)
    grey[8:30, 10:16] = 10
    base = Image.fromarray(grey)
    colour = Image.merge("RGB", (base, base.point(lambda level: level // 2), base.rotate(180)))
    turned = Image.Exif()
    turned[0x0112] = 6
    choices: list[tuple[Image.Image, dict[str, Any]]] = [(base, {}), (colour, {})]
    if kind == "PNG":
        clear = colour.copy()
        clear.putalpha(base.resize(colour.size))
        deep = Image.fromarray(grey.astype(np.uint16) * 257)
        choices += [
            (clear, {}),
            (deep, {}),
            (colour.convert("P"), {"transparency": 3}),
            (base, {"exif": turned}),
        ]
    elif kind == "JPEG":
        choices += [(colour, {"progressive": True}), (colour.convert("CMYK"), {}), (colour, {"exif": turned})]
    elif kind == "TIFF":
        choices += [(colour, {"compression": how}) for how in ("tiff_lzw", "tiff_deflate", "packbits")]
    elif kind == "GIF":
        choices += [(base, {"save_all": True, "append_images": [base.rotate(90)]})]
    result = []
    for picture, options in choices:
        content = io.BytesIO()
        picture.save(content, kind, **options)
        result.append(content.getvalue())
    return result


def picture_reader(folder: Path) -> Reader:
    """Read the content as a digit and as a colour picture."""

    def read(content: bytes) -> object:
        (folder / "picture").write_bytes(content)
        plain = load_picture(folder / "picture", channels=3, size=(32, 32))
        digit = load_picture(folder / "picture", channels=1, size=(28, 28))
        if plain.shape != (3, 32, 32) or digit.shape != (1, 28, 28):
            raise AssertionError("a picture of another shape than asked for")
        return digit

    return read


# --- formats: run folders


def make_run(folder: Path) -> Path:
    """A small finished run with a checkpoint; torch is loaded here and not before."""
    import torch

    from gammabeta.train.checkpoint import Checkpoints, State
    from gammabeta.train.network import DigitNetwork
    from gammabeta.train.recipe import load_recipe
    from gammabeta.train.run import Run

    torch.set_num_threads(1)
    network = {"channels": 1, "height": 28, "width": 28, "classes": list("0123456789")}
    network |= {"pixel_mean": [0.0], "pixel_scale": [1.0]}
    info = {"seed": 0, "device": "cpu", "precision": "fp32", "data": "mnist", "network": network}
    recipe = load_recipe("classic")
    run = Run.create(folder / "run", info, recipe)
    figures = {"images": 64, "loss": 1.0, "accuracy": 0.5}
    run.record("progress", step=1, epochs=0.1, learning_rate=0.1, seconds=0.1, **figures)
    run.save_model(DigitNetwork(1, (28, 28), 10))
    result = {"epochs": 1, "steps": 1, "images": 64, "loss": 1.0, "train_accuracy": 0.5, "test_accuracy": 0.5}
    result |= {"test_loss": 1.0, "precision": "fp32", "seconds": {"train": 0.1}, "images_per_second": 640}
    run.finish("finished", result)
    values = {"step": 1, "seconds": 0.1, "metrics_bytes": 0, "recipe": recipe.model_dump(), **figures}
    Checkpoints(run.path).save(State({"x": torch.zeros(3)}, values))
    return run.path


def run_samples(name: str, folder: Path) -> list[bytes]:
    """One file of a run folder."""
    return [(make_run(folder) / name).read_bytes()]


def run_reader(name: str, folder: Path) -> Reader:
    """Read a run folder, of which the content is one file."""
    from gammabeta.train.checkpoint import Checkpoints
    from gammabeta.train.load import load_model
    from gammabeta.train.page import Shown, page

    path = folder / "run" if (folder / "run").is_dir() else make_run(folder)

    def read(content: bytes) -> object:
        (path / name).write_bytes(content)
        trained = load_model(path, "cpu")
        if name == "metrics.jsonl":
            page([Shown(trained.run)])
        return Checkpoints(path).load()

    return read


def run_format(name: str, **changes: Any) -> Format:
    """The format of one file of a run folder."""
    return Format(partial(run_samples, name), partial(run_reader, name), **changes)


FORMATS: dict[str, Format] = {
    "IDX images": Format(partial(idx_samples, "x_train"), partial(idx_reader, "x_train")),
    "IDX labels": Format(partial(idx_samples, "y_train"), partial(idx_reader, "y_train")),
    "IDX gzip": Format(packed_idx_samples, partial(idx_reader, "x_train")),
    "IDX gzip, repacked": Format(
        partial(idx_samples, "x_train"), partial(idx_reader, "x_train"), partial(gzip.compress, mtime=0)
    ),
    "NPZ": Format(npz_samples, npz_reader),
    "NPZ, rezipped": Format(npy_samples, npz_reader, seal_npz),
    **{
        kind: Format(partial(picture_samples, kind), picture_reader)
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP")
    },
    "PNG, checksums repaired": Format(partial(picture_samples, "PNG"), picture_reader, seal_png),
    "CSV": Format(csv_samples, file_reader("data.csv")),
    "safetensors": run_format("model.safetensors"),
    "run.json": run_format("run.json"),
    "run.json, values": run_format("run.json", damage=damage_json),
    "recipe.toml": run_format("recipe.toml"),
    "metrics.jsonl": run_format("metrics.jsonl"),
    "metrics.jsonl, values": run_format("metrics.jsonl", damage=damage_line),
    "checkpoint JSON": run_format("checkpoints/step-1.json"),
    "checkpoint JSON, values": run_format(
        "checkpoints/step-1.json", damage=damage_json, seal=seal_checkpoint
    ),
}
if find_spec("pyarrow"):
    FORMATS["Parquet"] = Format(parquet_samples, file_reader("data.parquet"))


# --- running


def judge(read: Reader, content: bytes) -> tuple[str, str]:
    """``accepted``, ``refused`` or ``failed``, and the message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", GammabetaWarning)  # a line for the user, and no failure
            read(content)
    except GammabetaError as error:
        message = str(error.args[0])  # as it was written: shown, it is one line whatever it holds
        return ("refused", message) if "\n" not in message else ("failed", f"several lines: {message!r}")
    except BaseException:
        return "failed", traceback.format_exc(limit=-4)
    return "accepted", ""


def _child(name: str, seed: int, first: int, count: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    kind = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        samples, read = kind.samples(Path(folder)), kind.reader(Path(folder))
        for sample in samples:  # what is not damaged must be accepted; this also loads every library
            outcome, message = judge(read, kind.seal(sample))
            if outcome != "accepted":
                pipe.send(f"{name}: undamaged input is {outcome}: {message}")
                return
        for number in range(first, first + count):
            content = kind.case(samples, seed, number)
            start = time.perf_counter()
            outcome, message = judge(read, content)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            pipe.send((number, outcome, message, seconds, peak))
    pipe.send(None)


@dataclass
class Tally:
    """What became of the inputs of one format."""

    outcomes: Counter[str]
    seconds: float = 0.0
    megabytes: float = 0.0


def run_format_in_child(name: str, seed: int, count: int) -> Tally:
    """Run ``count`` inputs of one format; failures are printed as they come."""
    tally, number = Tally(Counter()), 0
    context = multiprocessing.get_context("spawn")
    while number < count:
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(name, seed, number, count - number, there))
        child.start()
        there.close()
        number = _listen(name, here, number, count, tally)
        child.kill()
        child.join()
    return tally


def _listen(name: str, pipe: Connection, number: int, count: int, tally: Tally) -> int:
    """Take results until the child ends; returns the number to go on with."""
    # The first answer may wait for libraries to load.
    patience = 120.0
    while True:
        try:
            result = pipe.recv() if pipe.poll(patience) else ENDS[0]
        except EOFError:
            result = ENDS[1]
        if result is None:
            return count
        if isinstance(result, str) and result not in ENDS:
            raise SystemExit(result)
        if isinstance(result, str):
            _fail(name, number, result, tally)
            return number + 1
        number, outcome, message, seconds, peak = result
        if outcome == "failed":
            _fail(name, number, message, tally)
        elif seconds > SECONDS or peak > MEGABYTES:
            _fail(name, number, f"{outcome} after {seconds:.2f} s, with {peak:.0f} MB", tally)
        else:
            tally.outcomes[outcome] += 1
        tally.seconds, tally.megabytes = max(tally.seconds, seconds), max(tally.megabytes, peak)
        number, patience = number + 1, HANG


def _fail(name: str, number: int, what: str, tally: Tally) -> None:
    tally.outcomes["failed"] += 1
    print(f"FAILED {name}, input {number}: {what}", file=sys.stderr)


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Feed damaged files to every reader.")
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all, shared among the formats")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=FORMATS, help="one format only")
    options = parser.parse_args()
    names = [options.only] if options.only else list(FORMATS)
    share = -(-options.count // len(names))
    print("| format | inputs | accepted | refused | failed | slowest (ms) | peak memory (MB) |")
    print("|---|---|---|---|---|---|---|")
    failed = 0
    for name in names:
        tally = run_format_in_child(name, options.seed, share)
        counts = tally.outcomes
        row = [name, share, counts["accepted"], counts["refused"], counts["failed"]]
        print(
            f"| {' | '.join(map(str, row))} | {tally.seconds * 1000:.0f} | {tally.megabytes:.0f} |",
            flush=True,
        )
        failed += counts["failed"]
    print(f"\nseed {options.seed}, {share * len(names)} inputs, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
