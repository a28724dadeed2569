"""Build the peers' environments, one virtual environment each: ``python benchmarks/peers/build.py``.

Every environment is made from the pinned list ``requirements/<name>.txt`` and nothing else, so that no peer
sees another's packages. One that is already complete is left alone; ``--force`` builds it anew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
# NumPy 1.23.5, which MXNet 1.9.1 needs, has its last wheels for 3.11; the others use the same Python.
PYTHON = (3, 11)


def default_root() -> Path:
    """Return the folder the suite ``training`` looks in: ``$XDG_CACHE_HOME/gammabeta/peers``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gammabeta" / "peers"


def environments() -> list[str]:
    """Return the names of all environments, each once, in the order of ``peers.toml``."""
    peers = tomllib.loads((HERE / "peers.toml").read_text())
    return list(dict.fromkeys(peer["environment"] for peer in peers.values()))


def interpreter(environment: Path) -> Path:
    """Return the path of the environment's Python."""
    return environment / "bin" / "python"


def build(name: str, root: Path, python: str, force: bool) -> None:
    """Build one environment; its stamp is written last, so that half a build is never taken for one."""
    requirements = HERE / "requirements" / f"{name}.txt"
    environment, wanted = root / name, requirements.read_text()
    stamp = environment / "built-from.txt"
    if not force and stamp.is_file() and stamp.read_text() == wanted:
        print(f"{name}: already built in {environment}")
        return
    print(f"{name}: building {environment}", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    install = [str(interpreter(environment)), "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    subprocess.run([*install, "--requirement", str(requirements)], check=True)
    stamp.write_text(wanted)


def version_of(python: str) -> tuple[int, ...]:
    """Return the major and minor version of a Python interpreter."""
    code = "import sys; print(*sys.version_info[:2])"
    answer = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return tuple(int(part) for part in answer.split())


def main() -> int:
    """Parse the command line and build what it names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(environments())}; default: all"
    )
    parser.add_argument(
        "--into", type=Path, default=default_root(), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="a Python 3.11; default: the one running this"
    )
    parser.add_argument("--force", action="store_true", help="build anew what is already there")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in environments()]
    if unknown:
        parser.error(f"no environment is called {unknown[0]}: choose from {', '.join(environments())}")
    if version_of(options.python) != PYTHON:
        parser.error(
            f"the peers run on Python 3.11; name one with --python, {options.python} is another version"
        )
    failed = []
    for name in options.names or environments():
        try:
            build(name, options.into, options.python, options.force)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
