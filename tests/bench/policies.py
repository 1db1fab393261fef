"""Other orders of work for the same engine, as baselines of the server's own.

Each takes the place of `Batcher`, and of `Runner` where another code draws. The engine process of a server under such a
policy is `python -m tests.bench.policies NAME FD PULSE PAGE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from app.engine import engine
from app.engine.batcher import Batcher
from app.engine.row import Caps, Row, Work
from app.engine.runner import Runner, isolate
from app.errors import EngineError
from app.report import Phase
from app.request import Key, Recipe
from app.worker import process
from tests.bench.upstream import Upstream

PHASES: tuple[Phase, ...] = ("encode", "denoise", "decode")


def likeness(row: Row) -> Recipe:
    """What rows of a static batch have in common: all that decides their steps, and not what they show."""
    recipe, guidance = row.request.recipe, row.request.recipe.guidance
    return replace(recipe, guidance=replace(guidance, scale=guidance.scale if guidance.guided else 0.0))


class Static(Batcher):
    """Batches that run to their end: the oldest row, and those of its likeness wherever they stand in the line.

    There is no wait for more, and the cap of passes is the server's own. Who is next is who came first.
    """

    def __init__(
        self,
        caps: Callable[[Key], Caps | None],
        resident: Callable[[str, Phase, tuple[str, ...]], bool] = lambda *parts: True,
    ) -> None:
        super().__init__(caps, resident)
        self._line: dict[Row, None] = {}
        self._batch: list[Row] = []

    def add(self, row: Row) -> None:
        super().add(row)
        self._line[row] = None

    def remove(self, row: Row) -> None:
        super().remove(row)
        self._line.pop(row, None)

    def _step(self, now: float) -> Work | None:
        self._batch = [row for row in self._batch if row.stage != "gone"] or self._head()
        if not self._batch:
            return None
        key = self._batch[0].key
        entering = [row for row in self._batch if row.stage == "waiting"]
        if entering:
            caps = self._caps(key)
            ready = caps is not None and self._resident(key.model, "encode", ())
            return Work("encode", key, entering[: caps.encode]) if caps and ready else None
        held = all(row.stage == "started" and row.lease is not None for row in self._batch)
        return Work("denoise", key, list(self._batch)) if held else None

    def _head(self) -> list[Row]:
        """The rows of the next batch, which leave the line; none while the oldest cannot start."""
        first = next(iter(self._line), None)
        caps = self._caps(first.key) if first and self._free(first) else None
        if first is None or caps is None or not caps.slots:
            return []
        most = max(1, min(caps.slots, caps.passes // (first.each + bool(first.skipping))))
        batch: list[Row] = []
        for row in self._line:
            if len(batch) == most:
                break
            if self._joins(row, first):
                batch.append(row)
        for row in batch:
            del self._line[row]
        return batch

    def _free(self, row: Row) -> bool:
        return row.key.model not in self.paused and self._resident(row.key.model, "encode", ())

    def _joins(self, row: Row, first: Row) -> bool:
        return likeness(row) == likeness(first)


class Single(Static):
    """First come, first served, one row at a time."""

    def _joins(self, row: Row, first: Row) -> bool:
        return row is first


class Whole(Single):
    """The same, where one work is all of an image, from its text to its pixels."""

    def next(self, now: float) -> Work | None:
        first = next(iter(self._line), None)
        if first is None or not all(self._resident(first.key.model, phase, ()) for phase in PHASES):
            return None
        return Work("decode", first.key, [first])


class UpstreamRunner(Runner):
    """Draws with diffusers' own pipelines, one image a work.

    NOTE: a work here is a whole image, and counts as a decode where the engine decides what is hung.
    """

    dtype: torch.dtype | None = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._drawing: dict[str, Upstream] = {}

    def run(self, work: Work) -> None:
        if work.phase == "profile":
            super().run(work)
        else:
            isolate(self._whole, work.rows, work)

    def _whole(self, rows: list[Row], work: Work) -> None:
        (row,) = rows
        model = row.key.model
        components = self._pool.components(model, *PHASES)
        leased = self._pool.lease(components)
        try:
            if not leased or (family := self._pool.family(model)) is None:
                raise EngineError("the model is gone")
            if model not in self._drawing or self._drawing[model].family is not family:
                self._drawing[model] = Upstream(family, dtype=self.dtype)
            row.encode_start = time.monotonic()
            row.queued = row.encode_start - row.arrived
            work.images.append((row, self._drawing[model].draw(row.request, row.index), None))
        finally:
            if leased:
                self._pool.release(components)


class Bfloat16(UpstreamRunner):
    """The same in bfloat16, whatever the server's number format."""

    dtype = torch.bfloat16


class Policy(NamedTuple):
    """Who runs next, and what computes it."""

    batcher: type[Batcher]
    runner: type[Runner]


POLICIES = {
    "continuous": Policy(Batcher, Runner),
    "static": Policy(Static, Runner),
    "single": Policy(Single, Runner),
    "diffusers": Policy(Whole, UpstreamRunner),
    "diffusers-bf16": Policy(Whole, Bfloat16),
}
"""The first is the server as it is."""


if __name__ == "__main__":
    chosen = POLICIES[sys.argv.pop(1)]
    engine.Engine = partial(engine.Engine, batcher=chosen.batcher, runner=chosen.runner)  # type: ignore[misc, assignment]
    process.main()
