"""TensorBoard events beside ``metrics.jsonl``, for those who have TensorBoard installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UnavailableError


def check_tensorboard() -> None:
    """Raise ``UnavailableError`` unless TensorBoard is installed."""
    if find_spec("tensorboard") is None:
        raise UnavailableError("TensorBoard is not installed: pip install 'gammabeta[tensorboard]'")


class Board:
    """Writes a run's records as TensorBoard scalars into ``RUN/tensorboard``."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), flush_secs=5)

    def record(self, kind: str, values: dict[str, Any], step: int) -> None:
        """Write a record of ``metrics.jsonl``."""
        if kind == "statistics":
            for layer, figures in values["layers"].items():
                self._scalars(f"{kind}/{layer}", figures, step)
            return
        prefix = f"{kind}/{values['split']}" if "split" in values else kind
        self._scalars(prefix, {k: v for k, v in values.items() if k not in ("step", "split")}, step)

    def _scalars(self, prefix: str, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            if name == "percentiles":
                for level, figure in zip((15, 50, 85), value, strict=True):
                    self._writer.add_scalar(f"{prefix}/percentile_{level}", figure, step)
            elif isinstance(value, int | float):
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Flush everything to the disk."""
        self._writer.close()
