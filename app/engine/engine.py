"""Engine: owns the loop and the promises. A turn is three calls: batcher.next, runner.run, settle.

Knows nothing of processes, sockets or HTTP: requests come in by `submit`, facts go out by `emit`.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import time
from collections.abc import Callable
from dataclasses import replace

from app.engine.batcher import Batcher
from app.engine.profile import Profiles
from app.engine.promises import Promises
from app.engine.row import Caps, Key, Row, Work, default_key, rows_of
from app.engine.runner import Image, Outcome, Runner
from app.errors import Cancelled, DeadlineExceeded, InstepError, ShuttingDown
from app.pool.pool import Pool
from app.report import Announce, Failure, ModelState, Preview, Progress, Report, Result, Tick
from app.request import Request
from app.settings import Settings

SILENCE = 60.0
"""Seconds that a unit of work may take beyond twenty times its estimate before it counts as hung."""

FIRST_WORK = 600.0
"""The same while nothing is known of a key: the first forward measures, and may compile or page weights in."""


class Engine:
    """Rows of any sampler, step count and guidance through shared forwards, on one device.

    `submit`, `cancel`, `load` and `stop` are thread-safe; the rest runs on the caller of `tick` or `run`.
    clock: seconds, monotonic; deadlines are on it.
    """

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        emit: Callable[[Report], None],
        *,
        profiles: Profiles | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._emit = emit
        self._clock = clock
        self._runner = Runner(pool, profiles or Profiles(settings.cache), settings.deterministic)
        self._batcher = Batcher(self._caps)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._promises = Promises()
        self._sequence = itertools.count()
        self._announced, self._announced_at = Announce("start", 0.0), 0.0
        self._stopping = self._draining = False

    def submit(self, request: Request) -> None:
        """Take the request; its Results or its Failure come through `emit`."""
        self._inbox.put(lambda: self._add(request))

    def cancel(self, request_id: str) -> None:
        """Drop the request at the next step boundary; a Failure with Cancelled follows. Unknown ids are ignored."""
        self._inbox.put(lambda: self._fail(request_id, Cancelled("the request was cancelled")))

    def load(self, model_id: str) -> None:
        """Start loading a model that no request has asked for yet."""
        self._inbox.put(lambda: self._pool.want(model_id))

    def stop(self, drain: bool = False) -> None:
        """End `run`: at once, failing what is open, or with `drain` when the last open request is answered."""
        self._inbox.put(lambda: self._stop(drain))

    def run(self) -> None:
        """Turn until stopped. Says before every silence how long it may last; idle: 30 s, and again every 10 s."""
        while not self._stopping and not (self._draining and not self._promises):
            if not self.tick():
                self._announce("idle", 30.0)
                self._wait(0.1)
        for request_id in self._promises:
            self._fail(request_id, ShuttingDown("the server is shutting down"))

    def tick(self) -> bool:
        """One turn; False when there was nothing to do."""
        self._read_inbox()
        self._poll_models()
        self._expire()
        work = self._batcher.next(self._clock())
        if work is None:
            return False
        self._announce_work(work)
        start = self._clock()
        outcome = self._runner.run(work)
        self._settle(work, outcome, start)
        return True

    def _caps(self, key: Key) -> Caps | None:
        """The caps of a key, measured the first time; None while its model or its slots have no place."""
        if not self._runner.measured(key):
            error = self._measure(key)
            if error:
                self._fail_all(key.model, error, key)
        return self._runner.caps(key)

    def _measure(self, key: Key) -> InstepError | None:
        """Measure a key whose model is ready; the error when its first forward fails."""
        lease = self._pool.lease(key.model)
        if lease is None:
            return None
        self._announce("profile", FIRST_WORK)
        try:
            rate = self._runner.measure(key, lease.model).rate
        except InstepError as error:
            return error
        finally:
            lease.release()
        self._emit(ModelState(key.model, "ready", rates={f"{key.width}x{key.height}": rate}))
        return None

    def _read_inbox(self) -> None:
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._inbox.get(timeout=seconds)()

    def _add(self, request: Request) -> None:
        try:
            rows = rows_of(request, self._pool.cards, self._clock(), self._sequence)
        except InstepError as error:
            self._emit(Failure(request.id, error))
            return
        self._promises.make(request, rows)
        for row in rows:
            self._batcher.add(row)
        self._pool.want(request.model)
        failure = self._pool.failure(request.model)
        if failure is not None:
            self._fail(request.id, failure)

    def _poll_models(self) -> None:
        for state in self._pool.poll():
            self._emit(self._tried(state))
            error = self._pool.failure(state.model) if state.state == "failed" else None
            if error is not None:
                self._fail_all(state.model, error)

    def _tried(self, state: ModelState) -> ModelState:
        """A model that becomes ready while nobody waits is measured first, and counts as failed if that fails."""
        if state.state != "ready" or self._promises:
            return state
        error = self._measure(default_key(self._pool.cards[state.model]))
        return replace(state, state="failed", detail=error.message) if error else state

    def _fail_all(self, model: str, error: InstepError, key: Key | None = None) -> None:
        for request_id in self._promises.of(model, key):
            self._fail(request_id, error)

    def _expire(self) -> None:
        for request_id in self._promises.expired(self._clock()):
            self._fail(request_id, DeadlineExceeded("the deadline passed before the image was done"))

    def _fail(self, request_id: str, error: InstepError) -> None:
        """Answer a request with an error and drop all its rows; nothing for one that is answered already."""
        rows = self._promises.abandon(request_id)
        for row in rows:
            self._batcher.remove(row)
            self._runner.release(row)
        if rows:
            self._emit(Failure(request_id, error))

    def _stop(self, drain: bool) -> None:
        self._draining = drain
        self._stopping = not drain

    def _settle(self, work: Work, outcome: Outcome, start: float) -> None:
        """Write down what the work came to: rows move on, images leave, failures are told."""
        now = self._clock()
        for row, error in outcome.failed:
            self._fail(row.request.id, error)
        alive = [row for row in work.rows if row.stage != "gone"]
        if work.phase == "encode":
            self._settle_encode(alive, start, now)
        elif work.phase == "denoise":
            self._settle_denoise(alive, start, now)
        for image in outcome.images:
            self._settle_image(image, start)
        self._emit(self._tick(work, outcome, now - start))

    def _settle_encode(self, rows: list[Row], start: float, now: float) -> None:
        for row in rows:
            row.encode_start, row.denoise_start = start, now
            self._batcher.start(row)

    def _settle_denoise(self, rows: list[Row], start: float, now: float) -> None:
        for row in rows:
            row.line += 1
            row.served += now - start
            row.neighbours += len(rows)
            if row.request.progress:
                self._emit(Progress(row.request.id, row.index, row.line, row.lines))
            if row.line == row.lines:
                self._batcher.finish(row)
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
        self._promises.keep(row)
        timings = row.timings(self._clock())
        self._emit(Result(row.request.id, row.index, row.seed, image.pixels, timings, image.latents, row.warnings))

    def _tick(self, work: Work, outcome: Outcome, seconds: float) -> Tick:
        cap = caps.passes if (caps := self._runner.caps(work.key)) else 0
        passes = work.passes if work.phase == "denoise" else len(work.rows)
        return Tick(
            work.key.model, work.phase, len(work.rows), passes + outcome.padding, outcome.padding, cap, seconds,
            self._batcher.running, self._batcher.waiting,
        )  # fmt: skip

    def _announce_work(self, work: Work) -> None:
        caps = self._runner.caps(work.key)
        self._announce(work.phase, SILENCE + 20 * caps.rate * caps.passes if caps else FIRST_WORK)

    def _announce(self, phase: str, seconds: float) -> None:
        """Tell a change, or the same again when a third of it is gone; a Tick is a sign of life by itself."""
        fresh, now = Announce(phase, seconds), self._clock()
        if fresh != self._announced or now - self._announced_at >= seconds / 3:
            self._announced, self._announced_at = fresh, now
            self._emit(fresh)
