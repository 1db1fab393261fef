"""An engine inside this process, for the commands that need no server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Self

from app.cards.card import Card
from app.errors import EngineError
from app.jobs.job import Job
from app.report import Failure, Preview, Progress, Report, Result
from app.settings import Settings
from app.worker import plan
from app.worker.process import build
from app.worker.wire import Start


class Local:
    """Takes jobs as a Supervisor does, for an engine on a thread of this process.

    The engine has the first of the devices that the settings name. `observe` and the jobs get its reports on its
    thread, in order, and may submit further jobs. At the end of the context what is in flight is cancelled.
    """

    def __init__(
        self,
        settings: Settings,
        cards: dict[str, Card],
        *,
        observe: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self._device, self._threads = plan.devices(settings.devices)[0], plan.threads(settings)
        self._observe = observe
        self._jobs: dict[str, Job] = {}
        self._pool, self._engine = build(Start(settings, cards, self._device), self._hear)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._crash: EngineError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for job in list(self._jobs.values()):
            job.cancel()
        self._engine.stop()
        self._thread.join(timeout=60)
        self._pool.close()

    def submit(self, job: Job) -> Job:
        """Give the job to the engine and return it. It fails when the engine dies."""
        self._jobs[job.request.id] = job
        job.future.add_done_callback(partial(self._close, job.request.id))
        self._engine.submit(job.request)
        if self._crash:
            job.fail(self._crash)
        return job

    def _close(self, request_id: str, future: Future[list[Result]]) -> None:
        self._jobs.pop(request_id, None)
        if future.cancelled():
            self._engine.cancel(request_id)

    def _hear(self, report: Report) -> None:
        self._observe(report)
        if isinstance(report, Result | Progress | Preview | Failure) and (job := self._jobs.get(report.request_id)):
            job.hear(report)

    def _run(self) -> None:
        from app.pool.budget import use_threads

        use_threads(self._threads)
        try:
            self._engine.run()
        except Exception as error:
            self._crash = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
            for job in list(self._jobs.values()):
                job.fail(self._crash)
