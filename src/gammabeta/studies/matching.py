"""The cheapest pairing of rows with columns, for ``repair``."""

import numpy as np
import numpy.typing as npt


def assign(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return for each row of a square matrix its column, so that the sum of the costs is least.

    Shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987), O(n³). SciPy has the same; it
    is no dependency of ours, and would be for this alone.
    """
    n = len(cost)
    rows, columns = np.zeros(n + 1), np.zeros(n + 1)  # the potentials; place 0 stands for no row, no column
    row_of = np.zeros(n + 1, dtype=np.int64)
    for row in range(1, n + 1):
        row_of[0] = row
        nearest, before = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
        done = np.zeros(n + 1, dtype=bool)
        column = 0
        while row_of[column] != 0 or column == 0:
            done[column] = True
            at = row_of[column]
            reduced = cost[at - 1] - rows[at] - columns[1:]
            closer = ~done[1:] & (reduced < nearest[1:])
            nearest[1:][closer] = reduced[closer]
            before[1:][closer] = column
            following = 1 + int(np.argmin(np.where(done[1:], np.inf, nearest[1:])))
            step = nearest[following]
            rows[row_of[done]] += step
            columns[done] -= step
            nearest[~done] -= step
            column = following
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    found = np.empty(n, dtype=np.int64)
    found[row_of[1:] - 1] = np.arange(n)
    return found
