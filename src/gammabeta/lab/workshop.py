"""What all pages of one lab share: data, the trained network, and one lane on which all is computed.

Two trainings at once on two cores would only slow each other down, and neither torch's global settings nor
``diagnose`` are made for two threads. So work is cut into slices of some 60 ms that take turns on one thread.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ..data import Dataset
from ..errors import GammabetaError
from ..train.batches import DeviceImages, Scaling
from ..train.fitting import Observer, TrainingInterrupted
from ..train.loop import Progress
from .benches.folding import Folded
from .subject import CPU, Subject, load_digits, open_subject, train_subject

P = ParamSpec("P")
T = TypeVar("T")
SLICE = 0.06  # seconds


class Workshop:
    """The lab's state. ``state`` is what pages are told while the network is made ready."""

    def __init__(self, run: Path | None) -> None:
        self._run = run
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="lab")
        self.stopping = False
        self.state: dict[str, Any] = {"stage": "starting", "share": 0.0, "text": "Reading the digits"}
        self.sessions = 0
        self.steps = 0  # of all trainings of all pages: a test sees by it that they have stopped
        self.subject: Subject | None = None

    async def do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run some work when it is its turn, and return what it returns."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._lane, lambda: work(*args, **kwargs))

    async def prepare(self) -> None:
        """Open the run, or train a network; what went wrong is told on the pages."""
        try:
            self.subject = await self.do(self._make)
            self.state = {"stage": "ready", "share": 1.0, "text": "Ready"}
        except TrainingInterrupted:
            self.state = {"stage": "failed", "share": 0.0, "text": "The lab was closed"}
        except GammabetaError as error:
            self.state = {"stage": "failed", "share": 0.0, "text": str(error)}
        except Exception:
            if not self.stopping:
                logging.getLogger("gammabeta.lab").exception("the network could not be made ready")
            self.state = {"stage": "failed", "share": 0.0, "text": "This failed: see the terminal."}

    def open_run(self) -> None:
        """Open the run at once, so that a wrong name is an error of the command."""
        if self._run is not None:
            self.subject = open_subject(self._run)

    def _make(self) -> Subject:
        subject = self.subject or train_subject(digits(), _Reporter(self))
        _ = subject.test, subject.by_class, subject.classifier
        return subject

    def close(self) -> None:
        """Begin no more work."""
        self.stopping = True
        self._lane.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> Subject:
        """The trained network; an error while there is none."""
        if self.subject is None or self.state["stage"] != "ready":
            raise GammabetaError("the network is not trained yet")
        return self.subject

    @cached_property
    def scaling(self) -> Scaling:
        """Mean 0 and deviation 1 over all pixels of MNIST's training images."""
        return Scaling.of(digits().train.images, "standardized")

    @cached_property
    def images(self) -> DeviceImages:
        """MNIST's training images, for the trainings that pages start."""
        return DeviceImages(digits().train, self.scaling, CPU)

    @cached_property
    def test(self) -> DeviceImages:
        """MNIST's test images, by which these are judged."""
        return DeviceImages(digits().test, self.scaling, CPU)

    @cached_property
    def folded(self) -> Folded:
        """The trained network, folded."""
        return Folded.of(self.ready)

    def slice(self, step: Callable[[], object], wanted: Callable[[], bool] = lambda: True) -> None:
        """Take steps of a training for the length of a slice, at least one."""
        end = time.perf_counter() + SLICE
        while wanted() and not self.stopping:
            step()
            self.steps += 1
            if time.perf_counter() > end:
                break


class _Reporter(Observer):
    """Tells the pages how the first training goes on."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def progressed(self, progress: Progress, seconds: float) -> None:
        self._workshop.state = {
            "stage": "training",
            "share": progress.step / progress.steps,
            "text": f"Training: {progress.images:,} images seen, {progress.accuracy:.1%} right",
        }

    def compiling(self, done: int, kernels: int) -> None:
        self._workshop.state = {
            "stage": "compiling",
            "share": done / max(kernels, 1),
            "text": f"Compiling the kernels for this machine, once: {done} of {kernels}",
        }

    def stop_requested(self) -> bool:
        return self._workshop.stopping


@cache
def digits() -> Dataset:
    """MNIST, which is inside the package; what the trainings on the pages are trained on."""
    return load_digits()
