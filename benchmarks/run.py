"""Run a benchmark suite from a checkout: ``python benchmarks/run.py SUITE [OPTIONS]``."""

import sys

from gammabeta.bench.suites import main
from gammabeta.errors import GammabetaError

if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:], "python benchmarks/run.py"))
    except GammabetaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
