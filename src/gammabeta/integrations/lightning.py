"""Lightning callbacks: one that recalibrates, one that watches."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import UnavailableError, UsageError
from ..guard import Guard, watch
from ..stats.batches import ForwardFn
from ..stats.recalibrate import recalibrate

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise UnavailableError(
            "gammabeta.integrations.lightning needs Lightning: pip install lightning"
        ) from error

MOMENTS = ("end", "validation")


class Recalibrate(Callback):  # type: ignore[misc]
    """Exact running statistics before they are used.

    Example::

        trainer = L.Trainer(callbacks=[Recalibrate(samples=4096)])

    Args:
        when: "end": once, when training has ended and the final weights stand. "validation": also before each
            validation, so that it does not judge the weights by statistics of earlier ones.
        loader: training data; None: the trainer's own.
        samples: how many samples are used; None: all.
        model: finds the model in the LightningModule, such as ``lambda module: module.ema``; None: itself.
        forward_fn: as for ``gb.recalibrate``.

    Raises:
        UsageError: another moment.
    """

    def __init__(
        self,
        when: str = "end",
        *,
        loader: Iterable[Any] | None = None,
        samples: int | None = 4096,
        model: Callable[[Any], nn.Module] | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        super().__init__()
        if when not in MOMENTS:
            raise UsageError(f"when is {' or '.join(map(repr, MOMENTS))}, not {when!r}")
        self.when, self.loader, self.samples = when, loader, samples
        self.model, self.forward_fn = model, forward_fn

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate before a validation in training; the sanity check before it has nothing to judge."""
        if self.when == "validation" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate once the final weights stand."""
        self._recalibrate(trainer, pl_module)

    def _recalibrate(self, trainer: Any, pl_module: Any) -> None:
        loader = trainer.train_dataloader if self.loader is None else self.loader
        model = pl_module if self.model is None else self.model(pl_module)
        recalibrate(model, loader, samples=self.samples, forward_fn=self.forward_fn)


class Watch(Callback):  # type: ignore[misc]
    """``gb.watch`` for the whole training.

    Example::

        trainer = L.Trainer(callbacks=[Watch()])

    Args:
        model: finds the model in the LightningModule; None: itself.
        settings: as for ``gb.watch``: ``held``, ``loss``, ``tell``, ``on``.

    Attributes:
        guard: what ``gb.watch`` returned, once the training has begun; ``guard.noticed`` has what was found.
    """

    def __init__(self, model: Callable[[Any], nn.Module] | None = None, **settings: Any) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.guard: Guard | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin; the first optimizer is the clock."""
        model = pl_module if self.model is None else self.model(pl_module)
        self.guard = watch(model, trainer.optimizers[0], **self.settings)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks away."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks away."""
        self._close()

    def _close(self) -> None:
        if self.guard is not None:
            self.guard.close()
