"""Local: an engine inside this process, for the commands that need no server.

Knows nothing of what is asked of it or of how its reports are shown.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from app.cards.card import Card
from app.errors import EngineError
from app.report import Failure, ModelState, Report
from app.request import Request
from app.settings import Settings
from app.worker import plan
from app.worker.process import build
from app.worker.wire import Start


class Local:
    """Pool and Engine on the first of the devices that the settings name, turning on a thread of their own.

    listen: called on the engine's thread with every report, in order; it may call `submit`.
    """

    def __init__(
        self, settings: Settings, cards: dict[str, Card], *, listen: Callable[[Report], None] = lambda report: None
    ) -> None:
        device, self._threads = plan.devices(settings.devices)[0], plan.threads(settings)
        self._listen = listen
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._pool, self._engine = build(Start(settings, cards, device), self._hear)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._crash = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._engine.stop(drain=False)
        self._thread.join(timeout=60)
        self._pool.close()

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def reports(self) -> Iterator[Report]:
        """What the engine tells, in order, without end. Raises the error of a Failure, or that the engine died."""
        while (report := self._reports.get()) is not None:
            if isinstance(report, Failure):
                raise report.error
            yield report
        raise EngineError(f"the engine stopped: {self._crash}")

    def _hear(self, report: Report) -> None:
        self._listen(report)
        self._reports.put(report)

    def _run(self) -> None:
        from app.pool.budget import use_threads

        use_threads(self._threads)
        try:
            self._engine.run()
        except Exception as error:
            self._crash = f"{type(error).__name__}: {error}"
        self._reports.put(None)


def loading(report: Report) -> str | None:
    """One line on a model that loads or is ready; None for every other report."""
    if not isinstance(report, ModelState) or report.rates:
        return None
    return {
        "loading": f"loading {report.model} ...",
        "ready": f"{report.model} ready in {report.seconds:.1f} s",
    }.get(report.state)
