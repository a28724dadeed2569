"""``python benchmarks/run.py SUITE... [--quick] [--out DIR]``: run benchmarks and write their results."""

import argparse
import sys
from pathlib import Path

from gammabeta import bench
from gammabeta.bench import report
from gammabeta.errors import GammabetaError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "suites", nargs="+", choices=list(bench.SUITES), metavar="SUITE", help=", ".join(bench.SUITES)
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds; not for reporting")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="where results go"
    )
    given = parser.parse_args()
    options = bench.Options(quick=given.quick, out=given.out)
    try:
        for name in given.suites:
            result = bench.load(name)(options)
            for path in report.write(name, result, options.out):
                print(path)
            for key, value in result.summary.items():
                print(f"{key}: {value}")
    except GammabetaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
