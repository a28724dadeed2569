"""What a page may ask for: every message, its values within bounds; no path and no code among them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .benches.faults import KEYS

LONGEST = 1 << 16  # bytes of a message: a drawing has some 4,000 points at most

Unit = Annotated[float, Field(ge=0, le=1)]
Point = tuple[Unit, Unit]
Number = Annotated[int, Field(ge=0, le=9999)]
Key = Literal[KEYS]  # type: ignore[valid-type]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Seen(_Message):
    """The page has drawn one more frame of a training; without these the training waits."""

    do: Literal["seen"]
    bench: Literal["race", "break"]


class Draw(_Message):
    """Name what these strokes show."""

    do: Literal["draw"]
    strokes: Annotated[
        list[Annotated[list[Point], Field(min_length=1, max_length=3000)]],
        Field(min_length=1, max_length=100),
    ]


class Sample(_Message):
    """Name what a test image of a class shows."""

    do: Literal["draw.sample"]
    digit: int = Field(ge=0, le=9)
    number: Number


class RaceSet(_Message):
    """Put both networks at the start."""

    do: Literal["race.set"]
    rate: float = Field(ge=1e-4, le=10)
    batch: int = Field(ge=2, le=512)
    scale: float = Field(ge=0.01, le=10)
    depth: int = Field(ge=1, le=8)
    activation: Literal["relu", "tanh", "sigmoid"]
    seed: Number


class RaceRun(_Message):
    """Run, pause, or take one step."""

    do: Literal["race.run"]
    go: Literal["start", "pause", "step"]


class Channel(_Message):
    """Look at one channel; a number that is not given is the layer's own."""

    do: Literal["channel"]
    layer: int = Field(ge=0, le=2)
    channel: int = Field(ge=0, le=127)
    gamma: float | None = Field(default=None, ge=-5, le=5)
    beta: float | None = Field(default=None, ge=-5, le=5)
    eps: float | None = Field(default=None, ge=1e-8, le=10)
    draw: Number


class Mates(_Message):
    """Predict one image with other companions."""

    do: Literal["mates"]
    image: Number
    size: int = Field(ge=2, le=256)
    kind: Literal["mixed", "one"]
    digit: int = Field(ge=0, le=9)
    draw: Number


class MatesSizes(_Message):
    """The same at every batch size."""

    do: Literal["mates.sizes"]
    image: Number
    kind: Literal["mixed", "one"]
    digit: int = Field(ge=0, le=9)


class BreakTrain(_Message):
    """Train a network with these faults."""

    do: Literal["break.train"]
    faults: Annotated[list[Key], Field(max_length=len(KEYS))]
    seed: Number = 0


class BreakDo(_Message):
    """Stop the training, diagnose its model, or mend it."""

    do: Literal["break.do"]
    what: Literal["stop", "diagnose", "mend"]


class Fold(_Message):
    """Look at one channel's weights, and compare the outputs on 256 test images from this one on."""

    do: Literal["fold"]
    layer: int = Field(ge=0, le=2)
    channel: int = Field(ge=0, le=127)
    first: Number


class FoldTimes(_Message):
    """Measure one image before and after."""

    do: Literal["fold.times"]


Message = Annotated[
    Seen
    | Draw
    | Sample
    | RaceSet
    | RaceRun
    | Channel
    | Mates
    | MatesSizes
    | BreakTrain
    | BreakDo
    | Fold
    | FoldTimes,
    Field(discriminator="do"),
]
MESSAGES: TypeAdapter[Message] = TypeAdapter(Message)
