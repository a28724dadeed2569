"""How far a picture lies from those that a network learned from, by a few figures of its prepared pixels.

A network answers whatever it is shown, and is sure of itself where it knows nothing. These figures do not
say what
is in a picture; they say that a photograph, noise or an empty page is no digit, because none of the digits
had such brightness, contrast, rim or edges.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import DataError

_SAMPLE = 2000  # training pictures that are measured
_LEAST = 20  # fewer say nothing of how pictures of their kind differ
_FLOOR = 4.0  # of 255: a figure that hardly varies in training may be this far off without being strange
_NAMES = ("brightness", "contrast", "rim", "edges", "half-tones", "colourfulness", "red", "green")


@dataclass(frozen=True)
class Likeness:
    """The figures of the training pictures.

    ``mean`` (K,) and ``whitening`` (K, K): ``whitening @ (figures - mean)`` has variance 1 in each direction.
    ``distance`` is the root mean square of that; ``limit`` is what hardly any training picture exceeds.
    """

    mean: tuple[float, ...]
    whitening: tuple[tuple[float, ...], ...]
    limit: float

    def __post_init__(self) -> None:
        count = len(self.mean)
        shaped = count in (5, len(_NAMES)) and [len(row) for row in self.whitening] == [count] * count
        values = [self.limit, *self.mean, *(value for row in self.whitening for value in row)]
        if not shaped or not np.isfinite(values).all() or max(map(abs, values)) > 1e9 or self.limit <= 0:
            raise DataError("the statistics of the training pictures cannot be: they are damaged")

    @classmethod
    def of(cls, images: npt.NDArray[np.uint8]) -> "Likeness | None":
        """Measure training pictures (N, C, H, W); None where there are too few to say."""
        if len(images) < _LEAST or images.shape[1] not in (1, 3):
            return None
        values = _figures(images[:: -(-len(images) // _SAMPLE)])
        mean, (count, k) = values.mean(0), values.shape
        covariance = (values - mean).T @ (values - mean) / count
        # With few pictures the small directions of the covariance are chance: its diagonal steadies it.
        steady = 0.05 + k / count
        covariance = (covariance + steady * np.diag(np.diag(covariance))) / (1 + steady)
        covariance += _FLOOR**2 * np.eye(k)
        scale, axes = np.linalg.eigh(covariance)
        whitening = (axes / np.sqrt(scale)).T
        own = np.sqrt(np.square((values - mean) @ whitening.T).mean(1))
        limit = max(2.5, 1.25 * float(np.quantile(own, 0.999)) * (1 + k / count))
        return cls(tuple(mean.tolist()), tuple(map(tuple, whitening.tolist())), limit)

    def distance(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """How many standard deviations pictures (N, C, H, W) lie from the training's, (N,)."""
        off = (_figures(pictures) - np.array(self.mean)) @ np.array(self.whitening).T
        found: npt.NDArray[np.float64] = np.sqrt(np.square(off).mean(1))
        return found

    def complaint(self, picture: npt.NDArray[np.uint8], distance: float) -> str | None:
        """What is strange about a picture (C, H, W) beyond the limit, in words; None for one within it."""
        if distance <= self.limit:
            return None
        own, mean, whitening = _figures(picture[np.newaxis])[0], np.array(self.mean), np.array(self.whitening)
        spread = np.sqrt(np.diag(np.linalg.pinv(whitening.T @ whitening)))
        at = int(np.abs((own - mean) / np.maximum(spread, 1e-9)).argmax())
        return (
            f"unlike the training pictures: {distance:.1f} standard deviations from them, theirs within "
            f"{self.limit:.1f}; {_NAMES[at]} {own[at]:.0f} of 255, theirs {mean[at]:.0f} ± {spread[at]:.0f}"
        )

    def tempered(
        self, probabilities: npt.NDArray[np.float32], distances: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float32]:
        """Probabilities (N, classes) that approach equal shares beyond the limit; the likeliest stays so.

        The weight of the network's answer is ``(limit / distance)²``, at most 1; the rest is shared equally.
        """
        weight = np.minimum(1.0, np.square(self.limit / np.maximum(distances, 1e-9)))[:, np.newaxis]
        mixed = weight * probabilities + (1 - weight) / probabilities.shape[1]
        return np.where(weight < 1, mixed, probabilities).astype(np.float32)


def _figures(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Figures (N, 5 or 8) of pictures (N, C, H, W), each on the scale of a pixel."""
    grey = images.mean(1, dtype=np.float32)
    height, width = grey.shape[1:]
    band = max(1, round(0.04 * min(height, width)))
    inner = grey[:, band : height - band, band : width - band].sum((1, 2), dtype=np.float64)
    whole = grey.sum((1, 2), dtype=np.float64)
    rim = (whole - inner) / max(1, height * width - max(0, height - 2 * band) * max(0, width - 2 * band))
    edges = [
        np.abs(np.diff(grey, axis=axis)).mean((1, 2)) if grey.shape[axis] > 1 else 0 * rim for axis in (1, 2)
    ]
    half = 255 * ((grey > 48) & (grey < 207)).mean((1, 2))
    columns = [whole / (height * width), grey.std((1, 2)), rim, edges[0] + edges[1], half]
    if images.shape[1] == 3:
        columns.append((images.max(1) - images.min(1)).mean((1, 2)))
        columns += [images[:, band].mean((1, 2)) - columns[0] for band in (0, 1)]
    return np.stack(columns, 1).astype(np.float64)
