"""Supervisor: one engine process per device, kept alive; each job goes to the one that gets to it first.

Blame: which requests and models end engine processes, by what each process computed when it died.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Literal

from app.cards.card import Card
from app.cards.cards import Cards
from app.errors import (
    DeadlineExceeded,
    EngineError,
    InstepError,
    InvalidValue,
    LoadError,
    ModelNotFound,
    Unavailable,
)
from app.jobs.job import Job
from app.report import ModelState, Place, Report, Result
from app.request import Request
from app.settings import Settings
from app.worker import plan, wire
from app.worker.admission import Backlog, admit, after, best, choose
from app.worker.child import Child

WORKER = (sys.executable, "-m", "app.worker.process")

LOADS = 6
"""Deaths in a row during the load of a model or the measurement of a size, after which that is left for a while."""

_CRASHED = "The engine process ended twice while it computed this request alone; it is not tried again."

log = logging.getLogger("instep.worker")


class Supervisor:
    """Gives jobs to the engine processes, on the event loop that ran `start`, and keeps them until they are answered.

    When a process dies, its jobs go to a live one or wait for the next one, which begins them again. `observe` gets
    every report of every worker, with its name; a dead one holds no memory and its models are absent. replayed: how
    often jobs of a model were begun again. Raises SettingsError on DEVICES or PRELOAD that make no sense.
    """

    def __init__(
        self,
        settings: Settings,
        cards: dict[str, Card],
        *,
        observe: Callable[[Report, str], None] = lambda report, worker: None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.max_wait = settings.max_wait
        self.closing = False
        self.replayed: Counter[str] = Counter()
        self._settings, self._cards = settings, Cards(cards).models
        self._observe = observe
        self._preloads = plan.preloads(settings, cards)
        self._blame = Blame()
        self._stranded = Backlog()  # jobs that wait for an engine process
        self._bytes = 0  # of all requests in flight
        self.children = [
            Child(name, command, partial(self._first_order, device), self._hear, self._settle, self._bury)
            for name, device in plan.named(plan.devices(settings.devices))
        ]

    @property
    def states(self) -> dict[str, ModelState]:
        """For every card, the best state over the live workers; "absent" where none has touched it."""
        return {model: best(child.backlog.state(model) for child in self.children) for model in self._cards}

    @property
    def ready(self) -> bool:
        """A worker is live, every PRELOAD model has been ready on some worker, and the server is not draining.

        One that was evicted or unloaded since then comes back when it is asked for; one that failed does not.
        """
        proved = all(any(child.backlog.proved(model) for child in self.children) for model in self._preloads)
        return proved and self.live > 0 and not self.closing

    @property
    def live(self) -> int:
        """How many engine processes are able to work now."""
        return sum(child.live for child in self.children)

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of DEVICES; 0 where none runs."""
        return [child.pid for child in self.children]

    @property
    def queues(self) -> list[float]:
        """Estimated device seconds of the unanswered images of each worker, in the order of DEVICES.

        What waits for an engine process is in none of them.
        """
        return [child.backlog.seconds for child in self.children]

    @property
    def running(self) -> int:
        """Images in a batch, as of the workers' last reports; `waiting` has the other unanswered ones."""
        return sum(child.backlog.running for child in self.children)

    def images(self, model: str) -> tuple[int, int]:
        """Unanswered images of a model: those in the workers' last denoising forwards, and all."""
        rows, images = zip(*(backlog.images_of(model) for backlog in self._backlogs), strict=True)
        return sum(rows), sum(images)

    def stranded(self, model: str) -> int:
        """Unanswered images of a model that wait for an engine process."""
        return self._stranded.images_of(model)[1]

    @property
    def waiting(self) -> int:
        """Unanswered images that are not in a batch."""
        return sum(backlog.images for backlog in self._backlogs) - self.running

    @property
    def _backlogs(self) -> list[Backlog]:
        return [*(child.backlog for child in self.children), self._stranded]

    @property
    def restarts(self) -> int:
        """How often a process was started again."""
        return sum(child.restarts for child in self.children)

    async def start(self) -> None:
        """Start every process and wait for its Hello; models may still load.

        Raises the worker's own error (such as SettingsError for a device that is not there), or Unavailable when a
        process ends without a word; nothing is left running then.
        """
        log.info("starting engine processes on %s", ", ".join(child.name for child in self.children))
        try:
            await asyncio.gather(*(child.start() for child in self.children))
        except BaseException:
            await self.stop(0)
            raise

    async def stop(self, grace: float) -> None:
        """Take no new jobs, give those in flight `grace` seconds, fail the others, and end the processes.

        With a grace of 0 the processes are killed at once.
        """
        self.closing = True
        jobs = [job for backlog in self._backlogs for job in backlog.jobs.values()]
        if jobs and grace > 0:
            log.info("draining %d requests", len(jobs))
            await asyncio.wait([asyncio.gather(*jobs, return_exceptions=True)], timeout=grace)
        message = "The server shut down before this request was done."
        for job in jobs:
            job.fail(Unavailable(message, retry_after=5.0, code="shutting_down"))
        await asyncio.gather(*(child.stop(ask=grace > 0) for child in self.children))

    def submit(self, job: Job, *, limit: float | None = None) -> Job:
        """Give the job to the live worker that will get to it first, note what it may expect, and return it.

        Without one it waits for the next, unless the last restart failed. limit: device seconds that its tenant may
        have queued, None for its share alone. Raises Unavailable and RateLimited (both with retry_after, seconds),
        DeadlineExceeded, EngineError and LoadError for what ended engine processes, ModelNotFound, and InvalidValue for
        a sampler or a number of steps that the model's schedule does not have.
        """
        request = job.request
        if self.closing:
            raise Unavailable("The server is shutting down.", retry_after=5.0, code="shutting_down")
        if any(request.id in backlog.jobs for backlog in self._backlogs):
            raise InvalidValue(f'A request with the id "{request.id}" is in flight.', param="id")
        for model in request.recipe.models:
            self._check_model(model)
        if error := self._blame.error(request):
            raise error
        backlogs = [child.backlog for child in self.children if child.live] or [self._stranded]
        absent = min(child.back_in for child in self.children)
        if not any(child.proved for child in self.children):
            raise Unavailable("No engine process is running just now.", retry_after=max(1.0, absent), code="no_worker")
        size = len(wire.pack(("submit", request)))
        if self._bytes + size > self._settings.request_memory:
            words = "The requests in flight fill the memory that they may take (INSTEP_REQUEST_MEMORY)."
            raise Unavailable(words, retry_after=after(1.0), code="overloaded")
        chosen = backlogs[choose(backlogs, request.recipe.models, self.max_wait)]
        admit(job, chosen, backlogs, max_wait=self.max_wait, limit=limit, absent=absent)
        job.apart = self._blame.lines(request)
        self._give(job, chosen)
        self._bytes += size
        # NOTE: a callback that knew the job would keep its pictures.
        job.future.add_done_callback(partial(self._end, request, size))
        return job

    def _give(self, job: Job, backlog: Backlog) -> None:
        """Put the job into a backlog, and give it to the engine process that this is of."""
        backlog.add(job)
        child = next((child for child in self.children if child.backlog is backlog), None)
        if child:
            self.replayed[job.card.model] += job.sent > 0
            child.call("submit", job.send())
        elif (deadline := job.request.delivery.deadline) is not None:
            timer = asyncio.get_running_loop().call_at(deadline, self._expire, job)
            job.future.add_done_callback(lambda _: timer.cancel())

    def _expire(self, job: Job) -> None:
        """End a job that still waits for an engine process at its deadline."""
        if job.request.id in self._stranded.jobs:
            job.fail(DeadlineExceeded("The deadline passed while no engine process was running."))

    def _end(self, request: Request, size: int, future: Future[list[Result]]) -> None:
        """A job has ended, whoever ended it: take it off the books of its worker."""
        self._bytes -= size
        next(backlog for backlog in self._backlogs if request.id in backlog.jobs).end(request.id)
        if not future.cancelled() and not future.exception():
            self._blame.answered(request)
            return
        for child in self.children:  # an engine knows nothing of what it has failed itself, and ignores that
            child.call("cancel", request.id)

    def call(self, method: Literal["load", "unload"], model: str) -> None:
        """Load this model on every live worker, or unload it once its requests there are done.

        Raises ModelNotFound, and LoadError for a model that ended engine processes.
        """
        self._check_model(model)
        if method == "load" and (error := self._blame.of(model, self._cards[model].defaults.size)):
            raise error
        for child in self.children:
            child.call(method, model)

    def reload(self, cards: dict[str, Card], log_level: str) -> None:
        """Take these cards and this log level from now on; an open request keeps the card that it came with."""
        cards = Cards(cards).models
        for model, card in cards.items():
            self._blame.works(model, card.defaults.size)  # what kept it from being loaded may be mended
        self._cards = cards
        self._preloads = [model for model in self._preloads if model in cards]
        self._settings = self._settings.model_copy(update={"log_level": log_level})
        for child in self.children:
            child.call("reload", cards, log_level)

    def _check_model(self, model: str) -> None:
        if model not in self._cards:
            raise ModelNotFound(f'There is no model "{model}".', param="model")

    def _first_order(self, device: str) -> wire.Order:
        """The first order to each engine process of this device, with the cards of open requests too."""
        sizes = {model: self._cards[model].defaults.size for model in self._preloads}
        preload = ",".join(model for model, size in sizes.items() if not self._blame.of(model, size))
        jobs = [job for backlog in self._backlogs for job in backlog.jobs.values()]
        own = {card.id: card for job in jobs for card in (job.card, job.refiner) if card}
        cards = Cards(own).models | self._cards
        return "start", self._settings.model_copy(update={"preload": preload}), cards, device

    def _hear(self, report: Report, worker: str) -> None:
        if isinstance(report, ModelState) and report.rates:
            self._blame.works(report.model, *report.rates)
        self._observe(report, worker)

    def _bury(self, child: Child, reason: str) -> None:
        """Give the jobs of a worker that is gone to others, but for the guilty ones; what it had loaded is absent."""
        lost = list(child.backlog.jobs.values())
        self._blame.judge(*child.computed, child.backlog.jobs)
        for job in [job for backlog in self._backlogs for job in backlog.jobs.values()]:
            if error := self._blame.error(job.request):
                job.fail(error)
        if lost:
            log.error("%s: %d requests begin again: %s", child.name, len(lost), reason)
        for report in child.backlog.forget():
            try:
                self._observe(report, child.name)
            except Exception:  # the worker must come back, whatever the observer makes of its death
                log.exception("the observer failed on %s", type(report).__name__)
        self._stranded.rates = child.backlog.rates
        for job in list(child.backlog.jobs.values()):
            child.backlog.end(job.request.id)
            self._give(job, self._stranded)
        self._settle()

    def _settle(self) -> None:
        """Give the jobs that wait for an engine process to those that live, in the order in which they came.

        A job waits on where its model failed on all that live, while another process is expected.
        """
        live = [child.backlog for child in self.children if child.live]
        expected = any(child.proved and not child.live for child in self.children)
        for job in sorted(self._stranded.jobs.values(), key=lambda job: job.accepted) if live else ():
            models = job.request.recipe.models
            chosen = live[choose(live, models, self.max_wait)]
            if not expected or chosen.worst(models).state != "failed":
                self._stranded.end(job.request.id)
                self._give(job, chosen)


class Blame:
    """Finds out who ends engine processes, so that one request or model cannot do so for ever.

    Whatever a process computed or loaded when it died is suspect. The next process computes suspects in works of their
    own (`Job.apart`). A request that is alone on the page of another death, not past the line where it was suspect, is
    guilty: it and those that ask for the same pictures are not tried for `seconds`. Id, deadline, key and seeds do not
    count there, because a client who tries again brings a new id, and a new seed where it named none. One that left a
    death behind unanswered is suspect when it comes again. memory: how many are remembered, guilty and suspect.
    """

    def __init__(self, *, memory: int = 256, seconds: float = 600.0) -> None:
        self.memory, self.seconds = memory, seconds
        self._guilty: OrderedDict[bytes | str, float] = OrderedDict()
        self._suspects: OrderedDict[bytes, dict[int, int]] = OrderedDict()  # `Job.apart` by digest
        self._loads: Counter[bytes | str] = Counter()

    def judge(self, places: Sequence[Place], models: set[str], jobs: Mapping[str, Job]) -> None:
        """Learn from a death. places, models: as `Page.read`. jobs: those that the process had, by id."""
        found = [(jobs[name], index, line) for name, index, line in places if name in jobs]
        alone = len({job.request.id for job, *_ in found}) == 1 and not models
        if alone and any(line <= job.apart.get(index, -2) for job, index, line in found):
            self._condemn(_digest(found[0][0].request))
        for job, index, line in found:
            job.apart[index] = max(line, job.apart.get(index, line))
            self._suspects[_digest(job.request)] = job.apart
            if len(self._suspects) > self.memory:
                self._suspects.popitem(last=False)
        for model in models:
            self._loads[model] += 1
            if self._loads[model] >= LOADS:
                self._condemn(model)

    def works(self, model: str, *sizes: str) -> None:
        """Forget the deaths of a model that was loaded and measured at these sizes, or is to be tried again."""
        for mark in (model, *(f"{model} {size}" for size in sizes)):
            self._loads.pop(mark, None)
            self._guilty.pop(mark, None)

    def lines(self, request: Request) -> dict[int, int]:
        """The lines, by index, up to which its images are suspect, because it asks for the same as one that is."""
        return dict(self._suspects.get(_digest(request), {})) if self._suspects else {}

    def answered(self, request: Request) -> None:
        """Suspect a request, and those that ask for the same pictures, no longer."""
        if self._suspects:
            self._suspects.pop(_digest(request), None)

    def error(self, request: Request) -> InstepError | None:
        """Why this request is not tried now, or None."""
        if self._guilty and self._bars(_digest(request)):
            return EngineError(_CRASHED, code="crashed")
        errors = (self.of(model, request.recipe.key.size) for model in request.recipe.models)
        return next(filter(None, errors), None)

    def of(self, model: str, size: str) -> InstepError | None:
        """Why this model is not loaded now, or not measured at this size; or None."""
        words = f"{model}: the engine process ended {LOADS} times while it"
        if self._bars(model):
            return LoadError(f"{words} loaded this model")
        return EngineError(f"{words} measured {size}", code="crashed") if self._bars(f"{model} {size}") else None

    def _bars(self, mark: bytes | str) -> bool:
        return time.monotonic() - self._guilty.get(mark, -self.seconds) < self.seconds

    def _condemn(self, mark: bytes | str) -> None:
        self._guilty[mark] = time.monotonic()
        self._guilty.move_to_end(mark)
        self._loads.pop(mark, None)
        if len(self._guilty) > self.memory:
            self._guilty.popitem(last=False)


def _digest(request: Request) -> bytes:
    conditions = tuple(spec.condition for spec in request.images)
    return hashlib.sha256(repr((request.recipe, conditions)).encode()).digest()
