"""Engine: the loop and the open requests. A turn of it is three calls: next, run, settle."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import time
from collections.abc import Callable
from dataclasses import replace

from app.engine.batcher import Batcher
from app.engine.limits import Patience
from app.engine.profile import Profiles
from app.engine.row import Caps, Image, Outcome, Row, Work, default_key, rows_of
from app.engine.runner import Runner
from app.engine.turns import Turns
from app.errors import Cancelled, DeadlineExceeded, InstepError, OutOfMemory, Unavailable
from app.pool.budget import text_bytes
from app.pool.pool import Pool
from app.report import Failure, Memory, ModelState, Phase, Preview, Progress, Report, Tick
from app.request import Key, Request
from app.settings import Settings


class Engine:
    """Rows of any sampler, step count and guidance through shared forwards, on one device.

    `submit`, `cancel`, `load`, `unload` and `stop` are thread-safe; the rest runs on the caller of `tick` or `run`.
    emit: receives every report. batcher, runner: of another order of work, for a bench. clock: seconds, monotonic;
    deadlines are on it.
    """

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        emit: Callable[[Report], None],
        *,
        profiles: Profiles | None = None,
        batcher: type[Batcher] = Batcher,
        runner: type[Runner] = Runner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._emit, self._clock = pool, emit, clock
        profiles = profiles or Profiles(settings.cache, compiled=settings.compile)
        self._runner = runner(pool, profiles, settings.deterministic, text_bytes(settings), not settings.threads)
        self._batcher = batcher(self._caps, self._ready)
        self._turns = Turns(pool, self._runner.capacity.known)
        self._patience = Patience(pool, emit, clock, settings.compile)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sequence = itertools.count()
        self._open: dict[str, list[Row]] = {}  # the rows without an image yet, by request
        self._deadlines: list[tuple[float, str]] = []
        self._unmeasured: dict[Key, None] = {}
        self._measured_last = False
        self._leaving: set[str] = set()
        self._memory = self._reported = Memory(str(pool.device), self._runner.bytes)
        self._stopping = False

    def submit(self, request: Request) -> None:
        """Take the request; its Results or its Failure come through `emit`."""
        self._inbox.put(lambda: self._add(request))

    def cancel(self, request_id: str) -> None:
        """Drop the request at the next step boundary; a Failure with Cancelled follows. Unknown ids are ignored."""
        self._inbox.put(lambda: self._fail(request_id, Cancelled("the request was cancelled")))

    def load(self, model_id: str) -> None:
        """Start loading a model before a request asks for it."""
        self._inbox.put(lambda: self._load(model_id))

    def unload(self, model_id: str) -> None:
        """Drop a model when no request for it is open."""
        self._inbox.put(lambda: self._leaving.add(model_id))

    def stop(self) -> None:
        """End `run`, failing open requests."""
        self._inbox.put(self._stop)

    def run(self) -> None:
        """Turn until stopped. Every silence is announced with the seconds that it may last."""
        while not self._stopping:
            if not self.tick():
                self._patience.idle()
                with contextlib.suppress(queue.Empty):
                    self._inbox.get(timeout=0.1)()
        for request_id in list(self._open):
            self._fail(request_id, Unavailable("the server is shutting down", code="shutting_down"))

    def tick(self) -> bool:
        """One turn; False when there was nothing to do."""
        work = self._next()
        if work is None:
            return False
        self._do(work)
        return True

    def _do(self, work: Work) -> Outcome:
        self._patience.begin(work)
        start = self._clock()
        outcome = self._runner.run(work)
        self._settle(work, outcome, start)
        self._patience.end(work, outcome, self._clock() - start)
        return outcome

    def _next(self) -> Work | None:
        """The next work, after news from outside. One width of a key without caps is measured between two others."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()
        self._poll_models()
        self._unmeasured.clear()
        self._expire()
        self._ask_pool()
        keys = (key for key in list(self._unmeasured) if self._runner.capacity.measurable(key))
        profile = next((Work("profile", key) for key in keys), None)
        first = profile if profile and not self._measured_last else self._batcher.next(self._clock())
        work = first or profile
        self._measured_last = work is not None and work.phase == "profile"
        return work

    def _ask_pool(self) -> None:
        """Lease the network for every started row, ask the pool for the parts that other rows need, and tell the
        batcher which models may not start new rows."""
        rows = self._batcher.started
        for row in rows:
            self._runner.hold(row)
        for model in [model for model in self._leaving if not self._requests(model)]:
            self._leaving.discard(model)
            self._pool.unload(model)
        self._batcher.held = self._turns.ask(self._batcher.finished, rows, self._clock())

    def _ready(self, model: str, phase: Phase) -> bool:
        """Whether rows may begin this phase; one that starts must find its network, where all parts fit together."""
        both = phase == "encode" and self._pool.fits(model)
        return self._pool.resident(model, phase) and (not both or self._pool.resident(model, "denoise"))

    def _caps(self, key: Key) -> Caps | None:
        """The caps of a key; rows of a key without them wait until it is measured."""
        caps = self._runner.caps(key)
        if caps is None:
            self._unmeasured[key] = None
        return caps

    def _requests(self, model: str, key: Key | None = None) -> list[str]:
        """Ids of the open requests of a model, or of one key of it."""
        keys = {request_id: rows[0].key for request_id, rows in self._open.items()}
        return [request_id for request_id, own in keys.items() if own.model == model and key in (None, own)]

    def _load(self, model_id: str) -> None:
        self._leaving.discard(model_id)
        self._pool.want(model_id)

    def _stop(self) -> None:
        self._stopping = True

    def _add(self, request: Request) -> None:
        try:
            rows = rows_of(request, self._pool.cards, self._clock(), self._sequence)
        except InstepError as error:
            self._emit(Failure(request.id, error))
            return
        self._open[request.id] = rows
        if request.delivery.deadline is not None:
            heapq.heappush(self._deadlines, (request.delivery.deadline, request.id))
        for row in rows:
            self._batcher.add(row)
            self._turns.add(row)
        self._pool.want(request.recipe.model)
        failure = self._pool.failure(request.recipe.model)
        if failure is not None:
            self._fail(request.id, failure)

    def _fail(self, request_id: str, error: InstepError) -> None:
        """Answer a request with an error and drop its rows; nothing for one that is answered already."""
        rows = self._open.pop(request_id, [])
        for row in rows:
            self._batcher.remove(row)
            self._runner.release(row)
        if rows:
            self._emit(Failure(request_id, error))

    def _fail_all(self, model: str, error: InstepError, key: Key | None = None) -> None:
        for request_id in self._requests(model, key):
            self._fail(request_id, error)

    def _expire(self) -> None:
        """Fail the requests whose deadline has passed, or cannot be met any more."""
        now = self._clock()
        if len(self._deadlines) > 2 * len(self._open) + 64:  # most are of requests answered long ago
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._open]
            heapq.heapify(self._deadlines)
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            late.append(heapq.heappop(self._deadlines)[1])
        for request_id in [*late, *(row.request.id for row in self._batcher.doomed(now))]:
            self._fail(request_id, DeadlineExceeded("the image cannot be done before its deadline"))

    def _poll_models(self) -> None:
        """Report what has happened in the pool, and the memory in use when that has changed."""
        for change in self._pool.poll():
            if isinstance(change, Memory):
                self._memory = change
                continue
            if isinstance(change, ModelState):
                change = self._loaded(change) if change.state == "ready" else change
                error = self._pool.failure(change.model) if change.state == "failed" else None
                if error is not None:
                    self._fail_all(change.model, error)
                    self._runner.forget(change.model)
                elif change.state == "absent":
                    self._runner.tidy(change.model)
            self._emit(change)
        memory = replace(self._memory, bytes={**self._memory.bytes, **self._runner.bytes})
        if memory != self._reported:
            self._reported = memory
            self._emit(memory)

    def _loaded(self, state: ModelState) -> ModelState:
        """Measure a model that became ready while no request is open; it counts as failed if that fails."""
        self._turns.loaded(state.model, state.seconds)
        self._patience.forget(state.model)
        key = default_key(self._pool.cards[state.model])
        while not self._open and self._inbox.empty() and self._runner.capacity.measurable(key):
            if error := self._do(Work("profile", key)).error:
                return replace(state, state="failed", detail=error.message)
        return state

    def _settle(self, work: Work, outcome: Outcome, start: float) -> None:
        """Move the rows of a work on, emit its images, answer what failed. start: when it began."""
        if work.phase == "profile":
            self._settle_profile(work.key, outcome.error)
            return
        now = self._clock()
        passes = work.passes if work.phase == "denoise" else len(work.rows)  # before the rows go to their next lines
        self._batcher.charge(work, now - start)
        for row, error in outcome.failed:
            self._fail(row.request.id, error)
        alive = [row for row in work.rows if row.stage != "gone"]
        if work.phase == "encode":
            self._settle_encode(alive, start, now)
        elif work.phase == "denoise":
            if outcome.out_of_memory:
                self._runner.capacity.refuse(work.key, passes)
            elif not outcome.failed:
                self._runner.capacity.learn(work.key, passes, now - start, now)
            self._settle_denoise(alive, start, now)
        for image in outcome.images:
            self._settle_image(image, start)
        if not outcome.idle:
            self._emit_tick(work.key, work.phase, len(work.rows), passes, outcome, now - start)

    def _settle_profile(self, key: Key, error: InstepError | None) -> None:
        """Report the rate of a key once it is measured; its requests fail where the first forward did."""
        if isinstance(error, OutOfMemory):
            around = self._batcher.running, self._batcher.waiting, key.width, key.height
            self._emit(Tick(key.model, "denoise", 0, 0, 0, 0, 0.0, *around, out_of_memory=1))
        if error is not None:
            self._fail_all(key.model, error, key)
        elif caps := self._runner.capacity.known.get(key):
            self._emit(ModelState(key.model, "ready", rates={f"{key.width}x{key.height}": caps.rate}))

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
        self._open[row.request.id].remove(row)
        if not self._open[row.request.id]:
            del self._open[row.request.id]
        now = self._clock()
        self._turns.served(row.key.model, now - row.encode_start)
        self._emit(image.result(now))

    def _emit_tick(self, key: Key, phase: Phase, rows: int, passes: int, outcome: Outcome, seconds: float) -> None:
        cap = caps.passes if (caps := self._runner.caps(key)) else 0
        self._emit(
            Tick(
                key.model, phase, rows, passes + outcome.padding, outcome.padding, cap, seconds,
                self._batcher.running, self._batcher.waiting, key.width, key.height, outcome.out_of_memory,
                outcome.text_hits, outcome.text_misses,
            )
        )  # fmt: skip
