"""Test one corner of the versions that are supported, in an environment of its own.

Usage: ``python3.12 -m scripts.versions --torch 2.6.0 --numpy 1.26.4``, with the Python of the corner; without
``--torch`` and ``--numpy`` the newest that fit. It writes ``benchmarks/results/versions/CORNER.json`` and the
table in ``docs/versions.md``. Packages come from the index: PyTorch's with CUDA are 3 GB to fetch and 6 GB on
disk. It needs the standard library only. Exit code 1: tests failed; 2: no environment.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions"
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- corners -->", "<!-- end of corners -->"
#: What touches PyTorch, NumPy and Numba closely. The rest of the tests asks more of ourselves than of them.
TESTS = (
    "tests/functional/test_autograd.py",
    "tests/functional/test_batch_norm.py",
    "tests/functional/test_graphs.py",
    "tests/functional/test_torch_samples.py",
    "tests/nn/test_batchnorm.py",
    "tests/conversion",
    "tests/accelerate/test_chain.py",
    "tests/previous",
    "tests/stats/test_recalibrate.py",
    "tests/test_reference.py",
    "tests/train/test_loop.py",
)
SHOWN = ("torch", "numpy", "numba", "triton", "onnx", "onnxruntime")
_VERSIONS = f"""
import importlib.metadata as m, json
found = {{}}
for name in {SHOWN!r}:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""


def make(folder: Path, wanted: list[str]) -> Path:
    """Make an environment of this checkout, its tests' packages and ``wanted``. Return its Python."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted, "-e", f"{ROOT}[test]"], check=True)
    return python


def test(python: Path, report: Path) -> None:
    """Run the chosen tests; what came out of each is in ``report``, as JUnit's XML."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}", *TESTS]
    subprocess.run(command, cwd=ROOT, env=env)  # failures are in the report


def outcome(case: ET.Element) -> str:
    """``passed``, ``failed`` or ``skipped``."""
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def measured(python: Path, report: Path, seconds: float) -> dict[str, object]:
    """What is kept of a corner."""
    cases = list(ET.parse(report).iter("testcase"))
    counts = Counter(map(outcome, cases))
    found = subprocess.run([python, "-c", _VERSIONS], check=True, capture_output=True, text=True).stdout
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "python": platform.python_version(),
        "versions": json.loads(found),
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round(seconds / 60, 1),
        **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "failures": [
            f"{case.get('classname')}::{case.get('name')}" for case in cases if outcome(case) == "failed"
        ],
    }


def table() -> str:
    """The corners that were measured, one a line, by Python and PyTorch."""
    corners = [json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")]
    key = [[int(part) for part in c["versions"]["torch"].split("+")[0].split(".")] for c in corners]
    lines = ["| Python | PyTorch | NumPy | Numba | Triton | passed | failed | skipped | commit |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for _, corner in sorted(zip(key, corners, strict=True), key=lambda pair: (pair[0], pair[1]["python"])):
        of = corner["versions"]
        cells = [corner["python"], *(of.get(name, "none") for name in ("torch", "numpy", "numba", "triton"))]
        cells += [f"{corner[kind]:,}" for kind in ("passed", "failed", "skipped")]
        lines.append("| " + " | ".join([*cells, corner["commit"]]) + " |")
    return "\n".join(lines)


def write_page() -> None:
    """Put the table between the page's marks."""
    text = PAGE.read_text("utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n{table()}\n{after}", "utf-8")


def main() -> int:
    """Make an environment, test, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", help="its version")
    parser.add_argument("--numpy", help="its version")
    parser.add_argument("--env", type=Path, help="keep the environment in this folder, or use the one there")
    given = parser.parse_args()
    wanted = [f"{name}=={version}" for name in ("torch", "numpy") if (version := getattr(given, name))]
    with tempfile.TemporaryDirectory() as name:
        try:
            python = make(given.env.absolute() if given.env else Path(name) / "env", wanted)
        except subprocess.CalledProcessError:
            print(f"no environment for {' '.join(wanted)}: see pip's message above", file=sys.stderr)
            return 2
        report, begin = Path(name) / "report.xml", time.monotonic()
        test(python, report)
        result = measured(python, report, time.monotonic() - begin)
    of, python_version = result["versions"], ".".join(platform.python_version_tuple()[:2])
    RESULTS.mkdir(parents=True, exist_ok=True)
    corner = f"python-{python_version}-torch-{of['torch'].split('+')[0]}-numpy-{of['numpy']}"
    (RESULTS / f"{corner}.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    write_page()
    print(f"{corner}: {result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped")
    return int(result["failed"] != 0)


if __name__ == "__main__":
    sys.exit(main())
