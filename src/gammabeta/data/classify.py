"""What is in a picture: one way from a file, an image or an array to an answer, for runs and ONNX files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..arguments import check_type
from ..errors import DataError, UsageError
from ..text import visible
from .decode import Encoded, Source
from .pieces import Pieces
from .preparation import Preparation

Pixels = npt.NDArray[np.uint8]
Picture = str | PathLike[str] | BytesIO | Image.Image | npt.NDArray[np.uint8]

_BATCH = 64  # pictures that are held at once, fewer of large ones
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_SCATTERED = 3  # pieces; so many of which none is half the ink are 9 of the 10,000 test images of MNIST
_UNSURE = 0.6  # a likeliest class less probable than this is a guess


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture; printing it gives one line.

    Attributes:
        image: what the picture is called: its path, or ``picture`` and a number.
        top: the likeliest classes and their probabilities, likeliest first.
        distance: from the training pictures, in standard deviations; None where these are not known.
        unlike: what is strange about the picture, if it lies too far from them.
        why: why the answer is in doubt; None where it is not.
        prepared: what the network saw, uint8 (C, H, W).
    """

    image: str
    top: tuple[tuple[str, float], ...]
    distance: float | None
    unlike: str | None
    why: str | None
    prepared: Pixels

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """The probability of the likeliest class."""
        return self.top[0][1]

    @property
    def doubt(self) -> bool:
        """Whether somebody should look at the picture."""
        return self.why is not None

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {share:.1%}" for name, share in self.top)
        return visible(f"{self.image}: {shown}{f' ({self.why})' if self.why else ''}")

    __repr__ = __str__


@dataclass(frozen=True)
class Classifier:
    """A network that is ready for pictures, whatever computes it.

    ``probabilities`` maps uint8 (N, C, H, W), as ``preparation`` makes them, to float32 (N, classes).
    They are a softmax of the logits over ``temperature``, which was fitted to pictures like the training's.
    Below 1 it makes them surer: not of a picture that had to be brought to the training's style.
    """

    classes: Sequence[str]
    preparation: Preparation
    probabilities: Callable[[Pixels], npt.NDArray[np.float32]]
    temperature: float = 1.0

    def predict(self, pictures: Picture | Iterable[Picture], top: int = 1) -> "Prediction | list[Prediction]":
        """Name the class of one picture, or of each of several.

        Args:
            pictures: a path, a PIL image or a uint8 array (H, W), (H, W, C) or (C, H, W); or several of
                these, also as one array (N, C, H, W).
            top: how many classes to name for each picture.

        Returns:
            One `Prediction` for one picture, else a list.

        Raises:
            UsageError: ``pictures`` is no picture and not several, or ``top`` is below 1.
            DataError: a picture cannot be read, or nothing stands out on it.
        """
        kinds = (Iterable, PathLike, Image.Image)
        check_type("predict", "pictures", pictures, kinds, "a picture, or a list of pictures")
        if top < 1:
            raise UsageError(f"predict: top is the number of classes to name, at least 1, not {top}")
        single = isinstance(pictures, str | PathLike | BytesIO | Image.Image) or (
            isinstance(pictures, np.ndarray) and pictures.ndim < 4
        )
        several: Iterable[Any] = [pictures] if single else pictures  # type: ignore[assignment]
        named = [_named(picture, number) for number, picture in enumerate(several)]
        answers = []
        for _, answer in self.answers(named, top):
            if isinstance(answer, DataError):
                raise answer
            answers.append(answer)
        return answers[0] if single else answers

    def answers(
        self, found: Sequence[tuple[str, Source | DataError]], top: int = 1
    ) -> Iterator[tuple[str, Prediction | DataError]]:
        """Answer for named pictures in their order, a batch at a time; an error stands for its picture."""
        height, width = self.preparation.size
        batch = max(1, min(_BATCH, (_BATCH << 14) // (height * width)))
        for start in range(0, len(found), batch):
            yield from self._batch(found[start : start + batch], top)

    def _batch(
        self, found: Sequence[tuple[str, Source | DataError]], top: int
    ) -> Iterator[tuple[str, Prediction | DataError]]:
        pictures: list[tuple[Pixels, bool]] = []
        errors: list[DataError | None] = []
        for _, source in found:
            try:
                if isinstance(source, DataError):
                    raise source
                pictures.append(self.preparation.prepared(source))
                errors.append(None)
            except DataError as error:
                errors.append(error)
        answered = iter(
            self._answered(
                [name for (name, _), e in zip(found, errors, strict=True) if e is None], pictures, top
            )
        )
        for (name, _), failed in zip(found, errors, strict=True):
            yield name, next(answered) if failed is None else failed

    def _answered(self, names: list[str], found: list[tuple[Pixels, bool]], top: int) -> list[Prediction]:
        if not found:
            return []
        pictures = [picture for picture, _ in found]
        like, stack = self.preparation.like, np.stack(pictures)
        shares = self.probabilities(stack)
        brought = np.array([brought for _, brought in found])
        if self.temperature < 1 and brought.any():
            plain = shares[brought] ** np.float32(self.temperature)
            shares[brought] = plain / plain.sum(1, keepdims=True)
        distances = None if like is None else like.distance(stack)
        if like is not None and distances is not None:
            shares = like.tempered(shares, distances)
        answers = []
        for row, (name, picture) in enumerate(zip(names, pictures, strict=True)):
            likeliest = np.argsort(-shares[row], kind="stable")
            guesses = tuple(
                (self.classes[int(at)], float(shares[row, at])) for at in likeliest[: max(top, 2)]
            )
            distance = None if distances is None else float(distances[row])
            unlike = None if like is None else like.complaint(picture, distance or 0.0)
            why = self._several(picture) or unlike or _unsure(guesses)
            answers.append(Prediction(name, guesses[:top], distance, unlike, why, picture))
        return answers

    def _several(self, picture: Pixels) -> str | None:
        """Say that the prepared picture shows several digits side by side, or pieces of none."""
        if self.preparation.style != "digit":
            return None
        grey = picture.mean(0, dtype=np.float32)
        pieces = Pieces.of((grey if self.preparation.ink == "light" else 255 - grey) > 96)
        top, bottom, _, _ = pieces.boxes.T
        tall = bottom - top
        count = int((tall >= 0.6 * tall.max(initial=0)).sum())
        if count > 1 and np.count_nonzero(tall >= 0.6 * (bottom.max() - top.min())) > 1:
            return f"{count} pieces found: one on a picture is expected; cut them apart"
        if len(pieces.areas) >= _SCATTERED and 2 * pieces.areas.max() < pieces.areas.sum():
            return f"the ink is in {len(pieces.areas)} pieces, none of them half of it: is this a digit?"
        return None


def _unsure(guesses: Sequence[tuple[str, float]]) -> str | None:
    if guesses[0][1] >= _UNSURE or len(guesses) < 2:
        return None
    (first, share), (second, other) = guesses[:2]
    return f"not sure: {first} {share:.0%}, {second} {other:.0%}"


def _named(picture: Any, number: int) -> tuple[str, Source]:
    """A picture's name, and what its preparation reads."""
    if isinstance(picture, str | PathLike):
        return str(picture), picture
    if isinstance(picture, BytesIO):
        return str(picture) if isinstance(picture, Encoded) else f"picture {number}", picture
    name = f"picture {number}"
    if not isinstance(picture, Image.Image):
        picture = _image(np.asarray(picture), name)
    buffer = BytesIO()
    try:
        picture.save(buffer, "PNG" if picture.mode in _IN_PNG else "TIFF")
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: an image in mode {picture.mode} cannot be read ({error})") from None
    return name, Encoded(name, buffer.getvalue())


def _image(pixels: npt.NDArray[Any], name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not shaped or not pixels.size:
        raise DataError(
            f"{name}: a picture is a uint8 array (H, W), (H, W, C) or (C, H, W) of 1 or 3 channels, "
            f"not {pixels.dtype} {pixels.shape}"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
