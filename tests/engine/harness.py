"""An engine in this process, and what it told: the tests' way to run requests to their end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.engine.engine import Engine
from app.report import Failure, Report, Result, Tick
from app.request import Request
from app.settings import Settings
from tests.engine.fakes import NOWHERE, FakeProfiles


class Bench:
    """Collects reports; `ticks` are the forwards, `results` and `failures` are by (request id, index) and id."""

    def __init__(
        self, pool: Any, *, deterministic: bool = False, threads: int = 0, profiles: Any = None, **engine: Any
    ) -> None:
        settings = Settings(deterministic=deterministic, threads=threads, cache=NOWHERE)
        self.reports: list[Report] = []
        profiles = profiles or FakeProfiles()
        self.engine = Engine(pool, settings, self.reports.append, profiles=profiles, **engine)

    def run(self, requests: Iterable[Request] = (), most: int = 100_000) -> Bench:
        """Submit, then turn until nothing is left to do."""
        for request in requests:
            self.engine.submit(request)
        for _ in range(most):
            if not self.engine.tick():
                return self
        raise AssertionError("the engine does not come to rest")

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.tick()

    @property
    def forwards(self) -> list[Tick]:
        return [report for report in self.reports if isinstance(report, Tick) and report.phase == "denoise"]

    @property
    def results(self) -> dict[tuple[str, int], Result]:
        return {(each.request_id, each.index): each for each in self.reports if isinstance(each, Result)}

    @property
    def failures(self) -> dict[str, Failure]:
        return {each.request_id: each for each in self.reports if isinstance(each, Failure)}

    def of(self, kind: type[Report]) -> list[Any]:
        return [each for each in self.reports if isinstance(each, kind)]
