"""A callback for the ``Trainer`` of transformers that recalibrates."""

from typing import Any

from ..errors import UnavailableError
from ..stats.batches import ForwardFn
from ..stats.recalibrate import recalibrate

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise UnavailableError(
        "gammabeta.integrations.transformers needs transformers: pip install transformers"
    ) from error


class Recalibrate(TrainerCallback):  # type: ignore[misc]
    """Exact running statistics when training has ended, and the best weights are loaded if wanted.

    Example::

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Recalibrate(samples=4096)])

    Args:
        samples: how many training samples are used; None: all.
        forward_fn: as for ``gb.recalibrate``; None: the batch's entries by name.
    """

    def __init__(self, samples: int | None = 4096, forward_fn: ForwardFn | None = None) -> None:
        self.samples, self.forward_fn = samples, forward_fn

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Recalibrate the trainer's model on its own training data."""
        recalibrate(
            kwargs["model"], kwargs["train_dataloader"], samples=self.samples, forward_fn=self.forward_fn
        )
