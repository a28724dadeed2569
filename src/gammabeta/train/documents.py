"""The documents of a run folder, checked whole when they are read: types, sizes, ranges, finite numbers.

A field that an earlier version did not write has the default given here: what that version did. A field of a
later version is kept, ignored, and told with a ``GammabetaWarning``.
"""

import math
import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    ValidationError,
)
from pydantic import model_validator as check
from typing_extensions import TypedDict

from ..data import Preparation
from ..data.preparation import preparation_of
from ..errors import GammabetaWarning, RunError
from ..files import read_json

HoldoutRule = Literal["last", "classes"]
FORMAT = 1
_LONGEST = 4096  # characters of a name or a path
_SETTINGS = ConfigDict(extra="allow", allow_inf_nan=False)


def _short(text: str) -> str:
    if len(text) > _LONGEST:
        raise ValueError(f"{len(text):,} characters are too many")
    return text


def _path(text: str) -> str:
    try:
        if b"\0" in os.fsencode(text):
            raise ValueError("a path cannot hold a null character")
    except UnicodeEncodeError:
        raise ValueError("no path can hold these characters") from None
    return _short(text)


def _known(value: Any) -> Any:
    """None for a figure that was not a finite number; 0.1.0 wrote such figures as they were."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _prepared(value: Any) -> Any:
    return value if value is None or isinstance(value, Preparation) else preparation_of(value)


Whole = Annotated[int, Strict()]
Real = Annotated[float, Strict()]  # whole numbers too
Text = Annotated[str, AfterValidator(_short)]
PathText = Annotated[str, AfterValidator(_path)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[Whole, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[Real, Field(ge=0, le=1e12)]
Epochs = Annotated[Real, Field(ge=0, le=1e9)]
Figure = Annotated[Real | None, Field(ge=-1e39, le=1e39), BeforeValidator(_known)]
Loss = Annotated[Real | None, Field(ge=0, le=1e39), BeforeValidator(_known)]
Share = Annotated[Real | None, Field(ge=0, le=1), BeforeValidator(_known)]


class Document(BaseModel):
    """Plain values that are checked; fields that are not known are kept."""

    model_config = _SETTINGS

    def unknown(self) -> list[str]:
        """Return the fields that this version does not know, those of documents within it included."""
        names = list(self.model_extra or ())
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Document):
                names += [f"{name}.{inner}" for inner in value.unknown()]
        return names


class NetworkInfo(Document):
    """What is needed to build the network again and to scale its input."""

    factory: None = Field(default=None, exclude=True)  # always null, in run folders of 0.1.0 only
    channels: Whole = Field(ge=1, le=4096)
    height: Whole = Field(ge=1, le=1 << 14)
    width: Whole = Field(ge=1, le=1 << 14)
    classes: list[Text] = Field(min_length=2, max_length=100_000)
    # In units of the uint8 pixel, for each channel.
    pixel_mean: list[Annotated[Real, Field(ge=-1e6, le=1e6)]] = Field(max_length=4096)
    pixel_scale: list[Annotated[Real, Field(gt=0, le=1e6)]] = Field(max_length=4096)
    kind: Literal["digits", "residual"] = "digits"
    base_width: Whole = Field(default=32, ge=1, le=4096)  # of a residual network, and
    blocks: Whole = Field(default=1, ge=1, le=100)
    model: Text | None = None  # timm:NAME, or module:function; None: of the kind
    batch_norm: StrictBool = True
    hidden_bias: StrictBool = True
    eps: Real = Field(default=1e-5, gt=0, le=1)
    preparation: Annotated[Preparation | None, BeforeValidator(_prepared)] = (
        None  # null before 0.2: see `Run.preparation`
    )
    temperature: Real = Field(default=1.0, ge=0.01, le=100)  # of the softmax of a prediction

    @check(mode="after")
    def _one_input(self) -> Self:
        kept = self.preparation
        if kept is not None and (kept.channels, *kept.size) != (self.channels, self.height, self.width):
            raise ValueError("the preparation is of another input than the network's")
        return self

    @check(mode="after")
    def _one_for_each_channel(self) -> Self:
        for name in ("pixel_mean", "pixel_scale"):
            if (found := len(getattr(self, name))) != self.channels:
                raise ValueError(f"{name} has {found} values for {self.channels} channels")
        return self


class MachineInfo(TypedDict, total=False):
    """The machine, for people; only ``threads`` is used."""

    __pydantic_config__ = _SETTINGS  # type: ignore[misc]

    threads: Count


class ProvenanceInfo(TypedDict, total=False):
    """How a run came about, for people; only the machine and the job of torchrun are used."""

    __pydantic_config__ = _SETTINGS  # type: ignore[misc]

    versions: dict[str, Text]
    commit: Text | None
    machine: MachineInfo
    command: list[Text]
    torchrun: dict[str, Text] | None


class ResultInfo(TypedDict):
    """The figures of a finished training."""

    __pydantic_config__ = _SETTINGS  # type: ignore[misc]

    epochs: Count
    passes: NotRequired[Epochs]  # epochs, the begun one as a fraction
    steps: Count
    images: Count
    loss: Loss
    train_accuracy: Share
    train_judged: NotRequired[Count]  # on how many training images; earlier: on all
    test_accuracy: Share
    test_loss: Loss
    validation_accuracy: NotRequired[Share]
    validation_loss: NotRequired[Loss]
    precision: Literal["fp32", "bf16"]
    seconds: dict[str, Seconds]
    images_per_second: Count


class Extension(Document):
    """A finished training that was given more epochs: where it was, how long it should have been."""

    step: Count
    epochs: Epochs
    result: ResultInfo | None = None


class InitialWeights(Document):
    """The run whose weights a training began with, and the SHA-256 of their file."""

    run: PathText
    sha256: Sha256


class RunInfo(Document):
    """The content of ``run.json``."""

    format: Literal[1] = 1
    status: Literal["running", "finished", "interrupted", "failed"]
    created: Text = ""
    finished: Text | None = None
    seed: Count
    device: Text
    precision: Literal["fp32", "bf16"]
    data: PathText  # as given
    data_path: PathText | None = None  # and absolute, unless it is a name
    data_name: Text | None = None  # of a data set with a name, whose files are elsewhere now
    data_sha256: Sha256 | None = None
    holdout: Count = 0
    holdout_rule: HoldoutRule = "last"
    skip_damaged: StrictBool = False
    network: NetworkInfo
    loss: Literal["objective", "cross-entropy"] = "objective"  # the training's, in the figures
    provenance: ProvenanceInfo = Field(default_factory=ProvenanceInfo)
    result: ResultInfo | None = None
    failure: Text | None = None  # why the status is "failed"; 0.1.0 did not write it
    init: InitialWeights | None = None
    extended: list[Extension] = []


class CheckpointInfo(Document):
    """The plain values of a checkpoint."""

    step: Count
    images: Count
    loss: Loss
    accuracy: Share
    seconds: Seconds
    metrics_bytes: Count
    best_loss: Loss = None
    # 0.1.0 wrote none of these; it wrote a checkpoint at the end of an epoch after judging it.
    judged: StrictBool = True
    lowest: Loss = None
    worse: Count = 0
    recipe: dict[str, Any] | None = None
    seed: Count | None = None


class Row(Document):
    """A line of ``metrics.jsonl``; one of a kind that is not known is left as it is."""

    kind: Text


class _Placed(Row):
    step: Count
    epochs: Epochs


class ProgressRow(_Placed):
    """Some steps were taken; moving averages, as in ``loop.Progress``."""

    images: Count
    loss: Loss
    accuracy: Share
    learning_rate: Figure
    seconds: Seconds


class EvaluationRow(_Placed):
    """A split was judged."""

    epoch: Count
    split: Text
    accuracy: Share
    loss: Loss
    correct: Count
    count: Count
    seconds: Seconds


class LayerRow(Document):
    """The figures of a batch-norm layer, as in ``evaluate.LayerStatistics``."""

    mean: Figure
    var: Figure
    mean_distance: Figure
    var_distance: Figure
    percentiles: list[Figure] = Field(min_length=3, max_length=3)


class StatisticsRow(_Placed):
    """The batch-norm layers were measured."""

    layers: dict[Text, LayerRow] = Field(min_length=1, max_length=10_000)


ROWS: dict[str, type[Row]] = {
    "progress": ProgressRow,
    "evaluation": EvaluationRow,
    "statistics": StatisticsRow,
}

D = TypeVar("D", bound=Document)


def complaint(error: ValidationError) -> str:
    """Return the first thing that is wrong, in a few words."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part)[:60] for part in first["loc"]) or "document"
    return f"{field}: {first['msg'].removeprefix('Value error, ').lower()[:200]}"


def read_run_info(path: Path) -> RunInfo:
    """Read ``run.json``; ``RunError`` if it is damaged, or of a format that came later."""
    document = read_json(path)
    if isinstance(document, dict):
        number = document.get("format")
        if type(number) is int and number > FORMAT:
            raise RunError(f"{path} has format {number}, of a later version of gammabeta: update gammabeta")
    try:
        info = RunInfo.model_validate(document)
    except ValidationError as error:
        raise RunError(f"{path} is damaged: {complaint(error)}") from None
    tell_unknown(path, info.unknown())
    return info


def tell_unknown(path: Path, names: list[str]) -> None:
    """Warn of fields that are ignored."""
    if names:
        some = ", ".join(name[:60] for name in names[:5]) + (", …" if len(names) > 5 else "")
        warn(f"{path} has fields that this version of gammabeta does not know and ignores: {some}")


def warn(message: str) -> None:
    """Tell something that stops nothing; the command line prints it once, as a line."""
    warnings.warn(message, GammabetaWarning, stacklevel=1)
