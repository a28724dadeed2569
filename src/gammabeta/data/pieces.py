"""Connected pieces of a mask, and where each of them lies."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """The pieces of a mask that touch by sides or corners; piece k has the number k + 1 in ``labels``.

    ``labels`` (H, W) is 0 outside; ``areas`` (K,) are in pixels; ``boxes`` (K, 4) are top, bottom, left and
    right, the second of each pair one past the end.
    """

    labels: Labels
    areas: Labels
    boxes: Labels

    @classmethod
    def of(cls, mask: Mask) -> "Pieces":
        """Find the pieces of a mask (H, W)."""
        labels = _labelled(mask)
        areas = np.bincount(labels.reshape(-1))[1:]
        y, x = np.nonzero(labels)
        of = labels[y, x] - 1
        boxes = np.empty((len(areas), 4), np.int64)
        boxes[:, ::2], boxes[:, 1::2] = max(mask.shape), 0
        for column, values in ((0, y), (2, x)):
            np.minimum.at(boxes[:, column], of, values)
            np.maximum.at(boxes[:, column + 1], of, values + 1)
        return cls(labels, areas, boxes)

    def mask(self, chosen: npt.NDArray[np.bool_]) -> Mask:
        """Where the pieces are for which ``chosen`` (K,) is true, (H, W)."""
        found: Mask = np.concatenate([[False], chosen])[self.labels]
        return found


def _labelled(mask: Mask) -> Labels:
    """Number the pieces from 1 on, row by row; union-find over the runs of each row."""
    parent = [0]
    labels = np.zeros(mask.shape, np.int64)
    above: list[tuple[int, int, int]] = []
    for row, line in enumerate(_runs(mask)):
        here = []
        for start, stop in line:
            touching = [label for first, last, label in above if first <= stop and last >= start]
            roots = {_root(parent, label) for label in touching}
            if roots:
                label = min(roots)
                for root in roots:
                    parent[root] = label
            else:
                label = len(parent)
                parent.append(label)
            labels[row, start:stop] = label
            here.append((start, stop, label))
        above = here
    roots_of = np.array([_root(parent, label) for label in range(len(parent))])
    numbers: Labels = np.searchsorted(np.unique(roots_of), roots_of)
    return numbers[labels]


def _runs(mask: Mask) -> list[list[tuple[int, int]]]:
    """For each row, (start, stop) of every unbroken run."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    lines: list[list[tuple[int, int]]] = [[] for _ in range(len(mask))]
    changes = np.diff(padded, axis=1)
    starts, stops = np.argwhere(changes == 1), np.argwhere(changes == -1)
    for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist(), strict=True):
        lines[row].append((start, stop))
    return lines


def _root(parent: list[int], label: int) -> int:
    while parent[label] != label:
        parent[label] = parent[parent[label]]
        label = parent[label]
    return label
