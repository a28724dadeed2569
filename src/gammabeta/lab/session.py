"""One open page: its messages in, its answers out, its trainings, which end with it."""

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..doctor.report import Report
from ..errors import GammabetaError, UsageError
from ..jsontext import to_json
from . import settings, snippets
from .benches import channel, drawing, mates
from .benches.breakage import Breakage, findings
from .benches.race import Race, Track
from .workshop import Workshop

UNSEEN = 3  # frames of a training that may be on their way; then it waits for the page
RACE_STEPS = 3000  # a race ends here
WAITING = 8  # requests of a bench that may wait
SPREAD_DRAWS, SIZE_DRAWS = 8, 12
_log = logging.getLogger("gammabeta.lab")


class Session:
    """What belongs to one page: requests of a bench are answered in order, other benches' beside them."""

    def __init__(self, socket: WebSocket, workshop: Workshop, reports: dict[str, Report]) -> None:
        self._socket, self._workshop, self._reports = socket, workshop, reports
        self._race: Race | None = None
        self._breakage: Breakage | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the trainings
        self._queues: dict[str, asyncio.Queue[Any]] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._credit: dict[str, asyncio.Semaphore] = {}  # frames that a training may still send unseen
        self._tokens: list[str] = []

    async def run(self) -> None:
        """Serve the page until it ends; then nothing of it goes on."""
        self._workshop.sessions += 1
        progress = asyncio.create_task(self._report_progress())
        try:
            while True:
                self._take(await self._socket.receive_text())
        except (WebSocketDisconnect, RuntimeError, KeyError):  # closed, reloaded, or not our page's text
            pass
        finally:
            self._workshop.sessions -= 1
            for task in (progress, *self._workers, *self._tasks.values()):
                task.cancel()
            for token in self._tokens:
                self._reports.pop(token, None)

    def _take(self, text: str) -> None:
        try:
            message = settings.MESSAGES.validate_json(text)
        except ValidationError as error:
            wrong = error.errors()[0]
            self._put("lab", UsageError(f"{wrong['loc']}: {wrong['msg']}"))
            return
        if isinstance(message, settings.Seen):
            if message.bench in self._credit:
                with suppress(ValueError):  # more than were sent
                    self._credit[message.bench].release()
            return
        self._put(message.do.partition(".")[0], message)

    def _put(self, bench: str, message: Any) -> None:
        if bench not in self._queues:
            self._queues[bench] = asyncio.Queue()
            self._workers.append(asyncio.create_task(self._serve(bench)))
        if self._queues[bench].qsize() < WAITING:
            self._queues[bench].put_nowait(message)

    async def _serve(self, bench: str) -> None:
        """Answer the requests of a bench, one after the other."""
        while True:
            message = await self._queues[bench].get()
            await self._guarded(bench, self._answer(message), getattr(message, "do", None))

    async def _guarded(self, bench: str, work: Coroutine[Any, Any, None], request: str | None = None) -> None:
        """Do some work; an error is told on the page, and a bug in the terminal as well."""
        told = {"about": "error", "bench": bench, "request": request}
        try:
            await work
        except GammabetaError as error:
            await self.send({**told, "text": str(error)})
        except Exception:
            if self._workshop.stopping:
                return
            _log.exception("the bench %s failed", bench)
            await self.send({**told, "text": "This failed: see the terminal."})

    async def send(self, message: dict[str, Any]) -> None:
        """Send an answer; a page that has gone is not told."""
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._socket.send_text(to_json(message))

    async def _report_progress(self) -> None:
        told = None
        while told is None or told["stage"] not in ("ready", "failed"):
            state = self._workshop.state
            if state is not told:
                subject = self._workshop.subject
                known = {} if subject is None else {"accuracy": subject.accuracy, "seconds": subject.seconds}
                await self.send({"about": "lab", **state, **known})
                told = state
            await asyncio.sleep(0.1)

    async def _answer(self, message: Any) -> None:
        if isinstance(message, GammabetaError):
            raise message
        reply = await _ANSWERS[type(message)](self, message)
        if reply is not None:
            await self.send({"about": message.do, **reply})

    # --- draw a digit ---

    async def _draw(self, message: settings.Draw | settings.Sample) -> dict[str, Any]:
        subject, do = self._workshop.ready, self._workshop.do

        def work() -> dict[str, Any]:
            if isinstance(message, settings.Sample):
                picture = drawing.sample(subject, message.digit, message.number)
            else:
                picture = drawing.on_paper(message.strokes)
            return drawing.answer(subject, picture)

        return {**await do(work), "code": snippets.draw(subject)}

    # --- the race ---

    async def _set_race(self, message: settings.RaceSet) -> dict[str, Any]:
        running = self._running("race")
        await self._stop("race")
        track = Track(**message.model_dump(exclude={"do"}))
        workshop = self._workshop
        self._race = race = await workshop.do(lambda: Race(track, workshop.images, workshop.test))
        if running:
            self._start("race", self._run_race(race))
        return {**race.frame(0), "running": running, "code": snippets.race(track)}

    async def _control_race(self, message: settings.RaceRun) -> dict[str, Any] | None:
        race = self._race
        if race is None:
            raise UsageError("there is no race to run: set it up first")
        await self._stop("race")
        if message.go == "start" and race.steps < RACE_STEPS:
            self._start("race", self._run_race(race))
            return None
        since = race.steps
        if message.go == "step":
            await self._workshop.do(race.step)
        return {**race.frame(since), "running": False}

    async def _run_race(self, race: Race) -> None:
        while race.steps < RACE_STEPS:
            await self._credit["race"].acquire()
            since = race.steps
            await self._workshop.do(self._workshop.slice, race.step)
            running = race.steps < RACE_STEPS
            await self.send({"about": "race.frame", **race.frame(since), "running": running})

    # --- one channel ---

    async def _channel(self, message: settings.Channel) -> dict[str, Any]:
        lens = channel.Lens(**message.model_dump(exclude={"do"}))
        subject = self._workshop.ready
        found = await self._workshop.do(channel.look, subject, lens)
        return {**found, "code": snippets.channel(subject, found, lens)}

    # --- batch-mates ---

    async def _mates(self, message: settings.Mates) -> dict[str, Any]:
        company = mates.Company(message.image, message.size, message.kind, message.digit)
        subject, do = self._workshop.ready, self._workshop.do
        spread = await do(mates.draw, subject, company, SPREAD_DRAWS, message.draw)
        return {
            "label": subject.dataset.classes[spread.label],
            "picture": mates.picture(subject, company.image),
            "training": spread.training,
            "evaluation": spread.evaluation,
            "answers": [subject.dataset.classes[answer] for answer in spread.answers],
            "draw": message.draw,
            "code": snippets.mates(subject, company),
        }

    async def _mates_sizes(self, message: settings.MatesSizes) -> dict[str, Any]:
        subject, rows = self._workshop.ready, []
        for size in mates.SIZES:
            company = mates.Company(message.image, size, message.kind, message.digit)
            spread = await self._workshop.do(mates.draw, subject, company, SIZE_DRAWS, 1)
            rows.append([size, *spread.deviations])
            await self.send({"about": "mates.part", "rows": rows})
        return {"rows": rows}

    # --- break it ---

    async def _break(self, message: settings.BreakTrain) -> None:
        await self._stop("break")
        workshop, faults = self._workshop, frozenset(message.faults)
        self._breakage = breakage = await workshop.do(
            lambda: Breakage(faults, workshop.images, workshop.test, message.seed)
        )
        code = {"about": "break.train", "code": snippets.breakage(faults)}
        await self.send({**code, **breakage.frame()})
        self._start("break", self._run_breakage(breakage))

    async def _run_breakage(self, breakage: Breakage) -> None:
        while not breakage.finished:
            await self._credit["break"].acquire()
            await self._workshop.do(self._workshop.slice, breakage.step, lambda: not breakage.finished)
            await self.send({"about": "break.frame", **breakage.frame()})

    async def _examine(self, message: settings.BreakDo) -> dict[str, Any]:
        breakage = self._breakage
        if breakage is None:
            raise UsageError("train a network first")
        await self._stop("break")
        if message.what == "stop":
            return {"what": "stop", **breakage.frame()}
        if message.what == "mend":
            return {"what": "mend", **await self._workshop.do(breakage.mend)}
        report = await self._workshop.do(breakage.diagnose)
        token = secrets.token_urlsafe(16)
        self._reports[token] = report
        self._tokens.append(token)
        while len(self._tokens) > 3:
            self._reports.pop(self._tokens.pop(0), None)
        return {"what": "diagnose", "verdict": report.verdict, "groups": findings(report), "report": token}

    # --- fold it away ---

    async def _fold(self, message: settings.Fold) -> dict[str, Any]:
        workshop = self._workshop
        subject = workshop.ready

        def work() -> dict[str, Any]:
            folded = workshop.folded
            return {
                "weights": folded.weights(message.layer, message.channel),
                "difference": folded.difference(message.first, 256),
            }

        return {**await workshop.do(work), "code": snippets.fold(subject)}

    async def _fold_times(self, message: settings.FoldTimes) -> dict[str, Any]:
        workshop = self._workshop
        _ = workshop.ready
        return await workshop.do(lambda: dict(workshop.folded.times()))

    # --- trainings ---

    def _running(self, bench: str) -> bool:
        return bench in self._tasks and not self._tasks[bench].done()

    def _start(self, bench: str, training: Coroutine[Any, Any, None]) -> None:
        self._credit[bench] = asyncio.BoundedSemaphore(UNSEEN)
        self._tasks[bench] = asyncio.create_task(self._guarded(bench, training))

    async def _stop(self, bench: str) -> None:
        task = self._tasks.pop(bench, None)
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


_ANSWERS: dict[type, Any] = {
    settings.Draw: Session._draw,
    settings.Sample: Session._draw,
    settings.RaceSet: Session._set_race,
    settings.RaceRun: Session._control_race,
    settings.Channel: Session._channel,
    settings.Mates: Session._mates,
    settings.MatesSizes: Session._mates_sizes,
    settings.BreakTrain: Session._break,
    settings.BreakDo: Session._examine,
    settings.Fold: Session._fold,
    settings.FoldTimes: Session._fold_times,
}
