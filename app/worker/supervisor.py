"""Supervisor: one engine process per device, kept alive; each job goes to the one that gets to it first."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Literal

from app.cards.card import Card
from app.errors import EngineError, InvalidValue, ModelNotFound, Unavailable
from app.jobs.job import Job
from app.report import ModelState, Report, Result
from app.request import Condition, Recipe, Request
from app.settings import Settings
from app.worker import plan
from app.worker.admission import admit, best, choose
from app.worker.child import Child

WORKER = (sys.executable, "-m", "app.worker.process")
_DIED = "The engine process died while it worked on this request. Try again."
_POISON = "The engine process died twice while it worked on this request; it is not tried again."

log = logging.getLogger("instep.worker")

Fingerprint = tuple[Recipe, tuple[Condition, ...]]


class Supervisor:
    """Gives jobs to the engine processes, on the event loop that ran `start`.

    `observe` gets every report of every worker, with its name; a dead one holds no memory and its models are absent.
    Raises SettingsError on DEVICES or PRELOAD that make no sense.
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
        self._cards = cards
        self._observe = observe
        self._preloads = plan.preloads(settings, cards)
        self._crashes = CrashHistory()
        self.children = [
            Child(name, command, ("start", settings, cards, device), observe, self._bury)
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
        """Estimated device seconds of the unanswered images of each worker, in the order of DEVICES."""
        return [child.backlog.seconds for child in self.children]

    @property
    def running(self) -> int:
        """Images in a batch, as of the workers' last reports; `waiting` has the other unanswered ones."""
        return sum(child.backlog.running for child in self.children)

    def images(self, model: str) -> tuple[int, int]:
        """Unanswered images of a model: those in the workers' last denoising forwards, and all."""
        rows, images = zip(*(child.backlog.images_of(model) for child in self.children), strict=True)
        return sum(rows), sum(images)

    @property
    def waiting(self) -> int:
        """Unanswered images that are not in a batch."""
        return sum(child.backlog.images for child in self.children) - self.running

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
        jobs = [job for child in self.children for job in child.backlog.jobs.values()]
        if jobs and grace > 0:
            log.info("draining %d requests", len(jobs))
            await asyncio.wait([asyncio.gather(*jobs, return_exceptions=True)], timeout=grace)
        message = "The server shut down before this request was done."
        for job in jobs:
            job.fail(Unavailable(message, retry_after=5.0, code="shutting_down"))
        await asyncio.gather(*(child.stop(ask=grace > 0) for child in self.children))

    def submit(self, job: Job, *, limit: float | None = None) -> Job:
        """Give the job to the live worker that will get to it first, note what it may expect, and return it.

        limit: device seconds that its tenant may have queued, None for its share alone. Raises Unavailable and
        RateLimited (both with retry_after, seconds), DeadlineExceeded, EngineError for a request that two crashes have
        in common, ModelNotFound, and InvalidValue for a sampler or a number of steps that the model's schedule does
        not have.
        """
        request = job.request
        if self.closing:
            raise Unavailable("The server is shutting down.", retry_after=5.0, code="shutting_down")
        if any(request.id in child.backlog.jobs for child in self.children):
            raise InvalidValue(f'A request with the id "{request.id}" is in flight.', param="id")
        if self._crashes.condemned(request):
            raise EngineError(_POISON)
        self._check_model(request.recipe.model)
        live = [child for child in self.children if child.live]
        if not live:
            wait = min(child.back_in for child in self.children)
            raise Unavailable("No engine process is running just now.", retry_after=max(1.0, wait), code="no_worker")
        backlogs = [child.backlog for child in live]
        child = live[choose(backlogs, request.recipe.model, self.max_wait)]
        admit(job, child.backlog, backlogs, max_wait=self.max_wait, limit=limit)
        child.backlog.add(job)
        child.call("submit", request)
        # NOTE: a callback that knew the job would keep its pictures.
        job.future.add_done_callback(partial(self._end, request))
        return job

    def _end(self, request: Request, future: Future[list[Result]]) -> None:
        """A job has ended, whoever ended it: take it off the books of its worker."""
        child = next(child for child in self.children if request.id in child.backlog.jobs)
        child.backlog.end(request.id)
        if future.cancelled():
            child.call("cancel", request.id)
        elif not future.exception():
            self._crashes.clear(request)

    def call(self, method: Literal["load", "unload"], model: str) -> None:
        """Load this model on every live worker, or unload it once its requests there are done. Raises ModelNotFound."""
        self._check_model(model)
        for child in self.children:
            child.call(method, model)

    def _check_model(self, model: str) -> None:
        if model not in self._cards:
            raise ModelNotFound(f'There is no model "{model}".', param="model")

    def _bury(self, child: Child, reason: str) -> None:
        """Answer the jobs of a worker that is gone, and report that what it had loaded is absent."""
        lost = list(child.backlog.jobs.values())
        if not self.closing:
            self._crashes.record(job.request for job in lost)
        retry_after = 1.0 if self.live else max(1.0, child.back_in)
        for job in lost:
            poison = self._crashes.condemned(job.request)
            job.fail(EngineError(_POISON) if poison else Unavailable(_DIED, retry_after=retry_after, code="no_worker"))
        if lost:
            log.error("%s: %d requests lost: %s", child.name, len(lost), reason)
        for report in child.backlog.forget():
            try:
                self._observe(report, child.name)
            except Exception:  # the worker must come back, whatever the observer makes of its death
                log.exception("the observer failed on %s", type(report).__name__)


class CrashHistory:
    """Remembers which requests were in a process that died, so that a poison request cannot kill for ever.

    Two requests are the same here when they ask for the same pictures: id, deadline, key and seeds do not count,
    because a client who tries again brings a new id, and a new seed where it named none. One success clears a request,
    so that a popular prompt that was only a bystander is tried again.
    """

    def __init__(self, *, memory: int = 256, seconds: float = 600.0) -> None:
        self.memory, self.seconds = memory, seconds
        self._seen: OrderedDict[Fingerprint, tuple[int, float]] = OrderedDict()

    def condemned(self, request: Request) -> bool:
        """Whether this request was present at two deaths, the last of them less than `seconds` ago."""
        count, when = self._seen.get(_fingerprint(request), (0, 0.0))
        return count >= 2 and time.monotonic() - when < self.seconds

    def record(self, requests: Iterable[Request]) -> None:
        """Remember that a process died with these in it. Twins in one death count once."""
        now = time.monotonic()
        for mark in {_fingerprint(request) for request in requests}:
            count, when = self._seen.pop(mark, (0, now))
            self._seen[mark] = (count + 1 if now - when < self.seconds else 1, now)
        while len(self._seen) > self.memory:
            self._seen.popitem(last=False)

    def clear(self, request: Request) -> None:
        """Forget a request that was answered."""
        self._seen.pop(_fingerprint(request), None)


def _fingerprint(request: Request) -> Fingerprint:
    return request.recipe, tuple(spec.condition for spec in request.images)
