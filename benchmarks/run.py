"""``python benchmarks/run.py SUITE... [OPTIONS]``: run benchmark suites and write their results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suites.command import main
from gammabeta.errors import GammabetaError

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], "python benchmarks/run.py"))
    except GammabetaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
