"""Supervisor: one engine process per device, kept alive; each request goes to the one that has least to do.

Knows nothing of HTTP and nothing of torch: it runs in the front process, on its event loop, and never blocks it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from app.cards.card import Card
from app.errors import EngineError, InstepError, InvalidValue, ModelNotFound, NoWorker, ShuttingDown
from app.report import Failure, Memory, ModelState, Preview, Progress, Report, Result
from app.request import Request
from app.settings import Settings
from app.worker import plan, wire
from app.worker.admission import admit, best, choose, kind_of
from app.worker.child import Child
from app.worker.jobs import Deaths, Job, OnReport, Ticket

WORKER = (sys.executable, "-m", "app.worker.process")
_POISON = "The engine process died twice while it worked on this request; it is not tried again."

log = logging.getLogger("instep.worker")


class Supervisor:
    """The front's one door to the engines.

    All methods belong to the event loop that ran `start`. `observe` gets every report of every worker, with its name;
    what a dead one had is told as absent. Raises SettingsError on DEVICES or PRELOAD that make no sense.
    """

    def __init__(
        self,
        settings: Settings,
        cards: dict[str, Card],
        *,
        observe: Callable[[Report, str], None] = lambda report, worker: None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self._settings = settings
        self._cards = cards
        self._observe = observe
        self._preloads = plan.preloads(settings, cards)
        self._deaths = Deaths()
        self._jobs: dict[str, Job] = {}
        self._closing = False
        self._children = [
            Child(name, command, wire.Start(settings, cards, device), self._hear, self._bury)
            for name, device in plan.named(plan.devices(settings.devices))
        ]

    @property
    def states(self) -> dict[str, ModelState]:
        """For every card, the best state over the live workers; "absent" where none has touched it."""
        return {model: best(child.backlog.state(model) for child in self._children) for model in self._cards}

    @property
    def ready(self) -> bool:
        """A worker is live, every PRELOAD model has been ready on some worker, and the server is not draining.

        One that was evicted or unloaded since then comes back when it is asked for; one that failed does not.
        """
        proved = all(any(child.backlog.proved(model) for child in self._children) for model in self._preloads)
        return proved and self.live > 0 and not self._closing

    @property
    def live(self) -> int:
        """How many engine processes are able to work now."""
        return sum(child.live for child in self._children)

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of DEVICES; 0 where none runs."""
        return [child.pid for child in self._children]

    @property
    def queues(self) -> list[float]:
        """Estimated device seconds of what each worker has not yet answered, in the order of DEVICES."""
        return [child.backlog.seconds for child in self._children]

    @property
    def queued_seconds(self) -> float:
        """The same over all workers."""
        return sum(self.queues)

    def tenants(self) -> dict[str, float]:
        """The same by tenant, of those who have any."""
        seconds: Counter[str] = Counter()
        for child in self._children:
            seconds.update(child.backlog.tenants())
        return dict(seconds)

    @property
    def running(self) -> int:
        """Images in a batch now, as the workers last told; with `waiting`, every image not yet answered."""
        return sum(child.backlog.running for child in self._children)

    @property
    def batched(self) -> dict[str, int]:
        """Images in the workers' last denoising forwards, by model."""
        return dict(sum((Counter(child.backlog.batched) for child in self._children), Counter[str]()))

    @property
    def waiting(self) -> int:
        """Images not yet answered that are not in a batch."""
        return sum(child.backlog.images for child in self._children) - self.running

    @property
    def restarts(self) -> int:
        """How often a process was started again."""
        return sum(child.restarts for child in self._children)

    async def start(self) -> None:
        """Start every process and wait for its Hello; models may still load.

        Raises the worker's own error (such as SettingsError for a device that is not there), or NoWorker when a
        process ends without a word; nothing is left running then.
        """
        log.info("starting engine processes on %s", ", ".join(child.name for child in self._children))
        try:
            await asyncio.gather(*(child.start() for child in self._children))
        except BaseException:
            await self.stop(0)
            raise

    async def stop(self, grace: float) -> None:
        """Take no new requests, give those in flight `grace` seconds, then end the processes.

        What is unanswered by then fails with ShuttingDown.
        """
        self._closing = True
        if self._jobs and grace > 0:
            log.info("draining %d requests", len(self._jobs))
            await asyncio.wait([job.future for job in self._jobs.values()], timeout=grace)
        for job in list(self._jobs.values()):
            self._fail(job, ShuttingDown("The server shut down before this request was done.", retry_after=5.0))
        await asyncio.gather(*(child.stop() for child in self._children))

    def submit(self, request: Request, on_report: OnReport | None = None, *, limit: float | None = None) -> Ticket:
        """Give the request to the live worker that will get to it first; its results come in image order.

        limit: device seconds that its tenant may have queued, None for its share alone. Cancelling the future cancels
        the request at the next step boundary. Raises ShuttingDown, NoWorker, Overloaded, RateLimited (all with
        retry_after, seconds), DeadlineExceeded, EngineError for a request that two deaths have in common,
        ModelNotFound, and InvalidValue for a sampler or a number of steps that the model's schedule does not have.
        """
        if self._closing:
            raise ShuttingDown("The server is shutting down.", retry_after=5.0)
        if request.id in self._jobs:
            raise InvalidValue(f'A request with the id "{request.id}" is in flight.', param="id")
        if self._deaths.condemned(request):
            raise EngineError(_POISON)
        kind, max_wait = kind_of(request, self._card(request.recipe.model)), self._settings.max_wait
        live = [child for child in self._children if child.live]
        if not live:
            wait = min(child.back_in for child in self._children)
            raise NoWorker("No engine process is running just now.", retry_after=max(1.0, wait))
        backlogs = [child.backlog for child in live]
        child = live[choose(backlogs, request.recipe.model, max_wait)]
        estimate = admit(request, kind, child.backlog, backlogs, max_wait=max_wait, limit=limit)
        job = self._jobs[request.id] = Job(request, Ticket(estimate), kind, on_report)
        job.future.add_done_callback(lambda _: self._close(child, job))
        child.take(job)
        return job.future

    def load(self, model_id: str) -> None:
        """Begin to load this model on every live worker. Raises ModelNotFound."""
        self._call("load", model_id)

    def unload(self, model_id: str) -> None:
        """Take this model off every live worker's device, once its requests there are done. Raises ModelNotFound."""
        self._call("unload", model_id)

    def _call(self, method: wire.Method, model_id: str) -> None:
        model = self._card(model_id).id
        for child in self._children:
            child.call(method, model)

    def _card(self, model_id: str) -> Card:
        if model_id not in self._cards:
            raise ModelNotFound(f'There is no model "{model_id}".', param="model")
        return self._cards[model_id]

    def _hear(self, child: Child, report: Report) -> None:
        """One report from a live worker. What is about a request that is no longer in flight is only observed."""
        match report:
            case Result() | Progress() | Preview():
                job = child.jobs.get(report.request_id)
                if job and not job.future.done():
                    self._deliver(child, job, report)
            case Failure():
                if job := child.jobs.get(report.request_id):
                    self._fail(job, report.error)
            case Memory(bytes=held):
                report = child.memory = Memory(child.name, held)
        self._tell(child, report)

    def _tell(self, child: Child, report: Report) -> None:
        try:
            self._observe(report, child.name)
        except Exception:
            log.exception("the observer failed on %s", type(report).__name__)

    def _deliver(self, child: Child, job: Job, report: Result | Progress | Preview) -> None:
        if isinstance(report, Result):
            child.answer(job, report)
        try:
            if job.on_report:
                job.on_report(report)
        except Exception:
            log.exception("the listener of request %s failed", job.request.id)
        if not job.images_left and not job.future.done():
            self._deaths.clear(job.request)
            job.future.set_result(job.in_order())

    def _fail(self, job: Job, error: InstepError) -> None:
        if not job.future.done():
            job.future.set_exception(error)

    def _close(self, child: Child, job: Job) -> None:
        """The future is done, whoever did it: the one place where a job leaves the books.

        Its exception is looked at here: where the client has left, nobody else does, and asyncio would log a traceback.
        """
        self._jobs.pop(job.request.id, None)
        child.drop(job)
        if job.future.cancelled():
            child.call("cancel", job.request.id)
        else:
            job.future.exception()

    def _bury(self, child: Child, reason: str) -> None:
        """A worker is gone: answer its requests at once, forget what it had loaded."""
        lost = list(child.jobs.values())
        if not self._closing:
            self._deaths.record(job.request for job in lost)
        retry_after = 1.0 if self.live else max(1.0, child.back_in)
        for job in lost:
            if self._deaths.condemned(job.request):
                self._fail(job, EngineError(_POISON))
            else:
                message = "The engine process died while it worked on this request. Try again."
                self._fail(job, NoWorker(message, retry_after=retry_after))
        self._tell(child, Memory(child.name, dict.fromkeys(child.memory.bytes, 0)))
        if lost:
            log.error("%s: %d requests lost: %s", child.name, len(lost), reason)
        for model in child.backlog.forget():
            self._tell(child, ModelState(model, "absent"))
