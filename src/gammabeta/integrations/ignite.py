"""An Ignite handler that recalibrates."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import UnavailableError
from ..stats.batches import ForwardFn
from ..stats.recalibrate import recalibrate

try:
    from ignite.engine import Engine, Events
except ImportError as error:
    raise UnavailableError(
        "gammabeta.integrations.ignite needs Ignite: pip install pytorch-ignite"
    ) from error


class Recalibrate:
    """Exact running statistics of a model at an event; of its moving average, if that is what you evaluate.

    Example::

        Recalibrate(model, loader, samples=4096).attach(trainer)

    Args:
        model: the model whose statistics are set, such as ``ema_handler.ema_model``.
        loader: training data.
        samples: how many samples are used; None: all.
        forward_fn: as for ``gb.recalibrate``.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        samples: int | None = 4096,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        self.model, self.loader, self.samples, self.forward_fn = model, loader, samples, forward_fn

    def attach(self, engine: Engine, event: Any = Events.COMPLETED) -> None:
        """Call this handler at an event of an engine; by default when training is complete."""
        engine.add_event_handler(event, self)

    def __call__(self, _: Engine) -> None:
        """Recalibrate."""
        recalibrate(self.model, self.loader, samples=self.samples, forward_fn=self.forward_fn)
