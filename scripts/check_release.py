"""Build the wheel and the source distribution, look at them, and train with the wheel in a fresh environment.

Usage: ``python -m scripts.check_release --out dist``, with the extra ``release``. It needs the package index.
The first step that fails ends it with exit code 1. What it built is left in ``--out``.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("py.typed", "data/mnist/", "lab/docs/lab.md", "train/recipes/fast.toml", "kernels/cpu/prepared.xz")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command without this checkout on its path; return what it printed, or exit with it."""
    print("$", *command, flush=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nexit code {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def version() -> str:
    """The version that the source says."""
    source = (ROOT / "src" / "gammabeta" / "__init__.py").read_text("utf-8")
    return re.findall(r'^__version__ = "(.+)"', source, re.M)[0]


def build(out: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it. Return the wheel and the source distribution."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty: give --out another folder, or delete what is in it")
    run(sys.executable, "-m", "build", "--outdir", out)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def look(wheel: Path, source: Path) -> None:
    """Check metadata and contents, and tell the sizes."""
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
    run(sys.executable, "-m", "check_wheel_contents", wheel)
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
    names = [file.filename.removeprefix("gammabeta/") for file in files]
    missing = [part for part in NEEDED if not any(name.startswith(part) for name in names)]
    if missing or f"gammabeta-{version()}" not in wheel.name:
        raise SystemExit(f"{wheel.name} is not version {version()}, or lacks {missing}")
    mnist = sum(file.compress_size for file in files if "/mnist/" in file.filename)
    print(
        f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB in {len(files)} files, MNIST {mnist / 1e6:.1f} MB"
    )
    print(f"{source.name}: {source.stat().st_size / 1e6:.1f} MB")


def resolve(wheel: Path) -> None:
    """Ask pip whether the wheel can be installed with each of its extras and the pinned versions."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for extra in extras:
        asked = (f"{wheel}[{extra}]", "-c", ROOT / "constraints.txt")
        run(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", *asked)
    print(f"every extra can be installed: {', '.join(extras)}")


def try_it(wheel: Path) -> None:
    """Install the wheel in a fresh environment and train with it, in an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "venv", folder / "venv")
        bin_folder = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        pip = (bin_folder / "python", "-m", "pip", "--disable-pip-version-check")
        run(*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        run(*pip, "check")
        (work := folder / "work").mkdir()
        if version() not in run(bin_folder / "gammabeta", "--version", cwd=work):
            raise SystemExit(f"gammabeta --version does not say {version()}")
        begin = time.perf_counter()
        printed = run(bin_folder / "gammabeta", "train", cwd=work)
        found = re.search(r"Test_acc (0\.\d+)", printed)
        if not found or float(found[1]) < 0.98:
            raise SystemExit(f"the training went wrong:\n{printed}")
        seconds = time.perf_counter() - begin
        print(f"a fresh environment trains: test accuracy {found[1]}, {seconds:.0f} s with the compilation")


def main() -> None:
    """Build, look, try."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="an empty or new folder")
    parser.add_argument("--no-train", action="store_true", help="do not install the wheel")
    given = parser.parse_args()
    wheel, source = build(given.out.absolute())
    look(wheel, source)
    resolve(wheel)
    if not given.no_train:
        try_it(wheel)
    print("ready to publish")


if __name__ == "__main__":
    main()
