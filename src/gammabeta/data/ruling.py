"""What is printed or drawn around a digit, found in the mask of all ink: lines of paper, and frames.

The lines of ruled and squared paper go straight from one edge of the picture to the other and are thin. They
are taken away as in optical music recognition, where staff lines must go and notes must stay (Dalitz et al.,
"A Comparative Study of Staff Removal Algorithms", 2008): a pixel on such a line goes only if the ink is thin
there, measured across the line, so a stroke that crosses it stays whole. A frame is ink along all four sides
of its own box with other ink inside.
"""

import numpy as np

from .pieces import Labels, Mask, Pieces

_THIN = 0.018  # of the picture's longer side: no printed line is thicker
_SLOPES = np.linspace(-0.08, 0.08, 41)  # a page is photographed up to 4.6 degrees askew
_ALONG = 0.75  # of the picture's width is ink along a line
_THINLY = 0.3  # of the width is thin there; strokes cover the rest
_BAND = 0.12  # of a frame's side: where its lines lie, which may be slightly askew
_HOLLOW = 0.5  # of a frame's box is ink at most
_SIDES = 0.8  # of each side of a frame is drawn
_INSIDE = 0.25  # of a frame's height: less ink inside is no digit


def without_lines(mask: Mask) -> Mask:
    """The mask (H, W) without the lines that cross the picture; unchanged where nothing else is in it."""
    across = _crossing(mask)
    rest = _without_rungs(mask & ~across, across) if across.any() else mask
    rest = rest & ~_crossing(rest.T).T
    return rest if rest.sum() >= 0.02 * mask.sum() else mask


def _crossing(mask: Mask) -> Mask:
    """The thin lines from the left edge to the right."""
    height, width = mask.shape
    most = _thickest(mask)
    thin = mask & (_heights(mask) <= most)
    y, x = np.nonzero(thin)
    if len(y) < _THINLY * width:
        return np.zeros_like(mask)
    reach = round(abs(float(_SLOPES[0])) * width) + 1
    counts = [np.bincount(np.rint(y - slope * x).astype(int) + reach, minlength=1) for slope in _SLOPES]
    slope = float(_SLOPES[np.argmax([np.square(count, dtype=np.float64).sum() for count in counts])])
    levels = height + 2 * reach + 3

    def straightened(part: Mask) -> Mask:
        """The page turned so that its lines are level, each a row thicker on both sides."""
        at_y, at_x = np.nonzero(part)
        level = np.rint(at_y - slope * at_x).astype(int) + reach
        turned = np.zeros((levels, width), bool)
        for near in (0, 1, 2):
            turned[level + near, at_x] = True
        return turned

    narrow, end = straightened(thin), max(1, width // 8)
    lines = (straightened(mask).mean(1) >= _ALONG) & (narrow.mean(1) >= _THINLY)
    lines &= np.minimum(narrow[:, :end].mean(1), narrow[:, -end:].mean(1)) >= 0.5
    around = np.zeros(levels, bool)
    for at in np.flatnonzero(lines):
        around[max(0, at - most) : at + most + 1] = True
    found = np.zeros_like(mask)
    on = around[np.rint(y - slope * x).astype(int) + reach + 1]
    found[y[on], x[on]] = True
    return found


def _thickest(mask: Mask) -> int:
    """How thick a printed line can be, in pixels."""
    return int(max(2, round(_THIN * max(mask.shape))))


def _without_rungs(rest: Mask, lines: Mask) -> Mask:
    """``rest`` without two or more thin uprights from line to line, the sides of a form's fields."""
    pieces = Pieces.of(rest)
    tall = pieces.boxes[:, 1] - pieces.boxes[:, 0]
    narrow = pieces.areas <= 1.6 * _thickest(rest) * tall
    upright: Mask = np.asarray(narrow & (tall >= 0.1 * max(rest.shape)))
    for number in np.flatnonzero(upright):
        top, bottom, left, right = pieces.boxes[number]
        near: Mask = np.asarray(lines[:, max(0, left - 2) : right + 2].any(1))
        upright[number] = near[max(0, top - 4) : top + 9].any() and near[bottom - 9 : bottom + 4].any()
    if upright.sum() < 2 or not (tall[~upright] >= _INSIDE * tall[upright].max()).any():
        return rest
    return rest & ~pieces.mask(upright)


def _heights(mask: Mask) -> Labels:
    """For each pixel of the mask the length of the unbroken run down its column, (H, W)."""
    padded = np.zeros((mask.shape[1], mask.shape[0] + 2), np.int8)
    padded[:, 1:-1] = mask.T
    changes = np.diff(padded, axis=1)
    starts, stops = np.argwhere(changes == 1), np.argwhere(changes == -1)
    lengths = stops[:, 1] - starts[:, 1]
    found = np.zeros(mask.T.shape, np.int64)
    found[mask.T] = np.repeat(lengths, lengths)  # column by column, as the runs were found
    return found.T


def without_frames(mask: Mask) -> Mask:
    """The mask without the frames that stand around other ink, of whatever number of boxes side by side."""
    while (frame := _frame(mask)) is not None:
        mask = mask & ~frame
    return mask


def _frame(mask: Mask) -> Mask | None:
    """A piece of ink along the four sides of its box, and the lines from side to side of it."""
    pieces = Pieces.of(mask)
    for number in np.argsort(-pieces.areas):
        top, bottom, left, right = pieces.boxes[number]
        if min(bottom - top, right - left) < 16:
            continue
        own = pieces.labels[top:bottom, left:right] == number + 1
        whole = mask[top:bottom, left:right]
        y, x = (max(2, round(_BAND * side)) for side in own.shape)
        drawn = (own[:y].any(0), own[-y:].any(0), own[:, :x].any(1), own[:, -x:].any(1))
        if own.mean() > _HOLLOW or min(side.mean() for side in drawn) < _SIDES:
            continue
        rim = np.ones(own.shape, bool)
        rim[y:-y, x:-x] = False
        walls = _from_end_to_end(own & ~rim, own.shape[0] - 2 * y)
        inside = Pieces.of(whole & ~rim & ~walls).boxes
        if not (inside[:, 1] - inside[:, 0] >= _INSIDE * own.shape[0]).any():
            continue
        found = np.zeros_like(mask)
        found[top:bottom, left:right] = (own & rim) | walls
        return found
    return None


def _from_end_to_end(mask: Mask, height: int) -> Mask:
    """The thin upright lines that reach from the top of a frame's inner part to its bottom."""
    pieces = Pieces.of(mask)
    tall = pieces.boxes[:, 1] - pieces.boxes[:, 0]
    return pieces.mask((tall >= 0.97 * height) & (pieces.areas <= 0.2 * height * tall))
