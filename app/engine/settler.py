"""Settler: writes down what a work came to: rows move on, images leave, failures are told.

Knows nothing of what runs next, or of how a report travels.
"""

from __future__ import annotations

from collections.abc import Callable

from app.engine.batcher import Batcher
from app.engine.outcome import Image, Outcome
from app.engine.promises import Promises
from app.engine.row import Row, Work
from app.engine.runner import Runner
from app.errors import InstepError, OutOfMemory
from app.report import Failure, Preview, Progress, Report, Result, Tick
from app.request import Key


class Settler:
    """Keeps the promises of requests. clock: the engine's; served(model, seconds): told of every image that is done."""

    def __init__(
        self,
        batcher: Batcher,
        runner: Runner,
        emit: Callable[[Report], None],
        clock: Callable[[], float],
        served: Callable[[str, float], None],
    ) -> None:
        self.promises = Promises()
        self._batcher, self._runner = batcher, runner
        self._emit, self._clock, self._served = emit, clock, served

    def fail(self, request_id: str, error: InstepError) -> None:
        """Answer a request with an error and drop all its rows; nothing for one that is answered already."""
        rows = self.promises.abandon(request_id)
        for row in rows:
            self._batcher.remove(row)
            self._runner.release(row)
        if rows:
            self._emit(Failure(request_id, error))

    def settle(self, work: Work, outcome: Outcome, start: float) -> None:
        """The work is done, since `start`."""
        now = self._clock()
        passes = work.passes if work.phase == "denoise" else len(work.rows)  # before the rows go to their next lines
        self._batcher.charge(work, now - start)
        for row, error in outcome.failed:
            self.fail(row.request.id, error)
        alive = [row for row in work.rows if row.stage != "gone"]
        if work.phase == "encode":
            self._settle_encode(alive, start, now)
        elif work.phase == "denoise":
            self._learn(work.key, passes, outcome, now - start, now)
            self._settle_denoise(alive, start, now)
        for image in outcome.images:
            self._settle_image(image, start)
        if not outcome.idle:
            self._emit(self._tick(work, passes, outcome, now - start))

    def unmeasured(self, key: Key, error: InstepError) -> None:
        """The first forward of a key failed, before there was a row in it; that it did not fit is counted."""
        if isinstance(error, OutOfMemory):
            around = self._batcher.running, self._batcher.waiting, key.width, key.height
            self._emit(Tick(key.model, "denoise", 0, 0, 0, 0, 0.0, *around, out_of_memory=1))

    def _learn(self, key: Key, passes: int, outcome: Outcome, seconds: float, now: float) -> None:
        """What a forward took, if it ran whole; or that it did not fit."""
        if outcome.out_of_memory:
            self._runner.limits.refuse(key, passes)
        elif not outcome.failed:
            self._runner.limits.learn(key, passes, seconds, now)

    def _settle_encode(self, rows: list[Row], start: float, now: float) -> None:
        for row in rows:
            if row.slot >= 0:
                row.encode_start, row.denoise_start = start, now
                self._batcher.start(row)
                self._runner.hold(row)

    def _settle_denoise(self, rows: list[Row], start: float, now: float) -> None:
        for row in rows:
            if not row.begun:
                row.idled = start - row.denoise_start
            row.line += 1
            row.served += now - start
            row.neighbours += len(rows)
            if row.request.delivery.progress:
                self._emit(Progress(row.request.id, row.index, row.line, row.lines))
            if row.line == row.lines:
                self._batcher.finish(row)
                self._runner.rest(row)
        due = [row for row in rows if row.preview_due()]
        if due:
            self._settle_previews(self._runner.preview(due))

    def _settle_previews(self, outcome: Outcome) -> None:
        for image in outcome.images:
            self._emit(Preview(image.row.request.id, image.row.index, image.row.previews, image.pixels))
        for row in [image.row for image in outcome.images] + [row for row, _ in outcome.failed]:
            row.previews += 1  # a preview that fails is left out: the image itself goes on

    def _settle_image(self, image: Image, start: float) -> None:
        row = image.row
        if row.stage == "gone":
            return
        row.decode_start = start
        self._batcher.remove(row)
        self._runner.release(row)
        self.promises.keep(row)
        now = self._clock()
        self._served(row.key.model, now - row.encode_start)
        timings = row.timings(now)
        self._emit(Result(row.request.id, row.index, row.seed, image.pixels, timings, image.latents, row.warnings))

    def _tick(self, work: Work, passes: int, outcome: Outcome, seconds: float) -> Tick:
        cap = caps.passes if (caps := self._runner.caps(work.key)) else 0
        return Tick(
            work.key.model, work.phase, len(work.rows), passes + outcome.padding, outcome.padding, cap, seconds,
            self._batcher.running, self._batcher.waiting, work.key.width, work.key.height, outcome.out_of_memory,
            outcome.text_hits, outcome.text_misses,
        )  # fmt: skip
