"""Engine: owns the loop and the promises. A turn is three calls: batcher.next, runner.run, settler.settle.

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
from app.engine.patience import Patience
from app.engine.profile import Profiles
from app.engine.row import Caps, default_key, rows_of
from app.engine.runner import Runner
from app.engine.settler import Settler
from app.engine.turns import Turns, standing
from app.errors import Cancelled, DeadlineExceeded, InstepError, ShuttingDown
from app.pool.budget import text_bytes
from app.pool.pool import Pool
from app.report import Failure, Memory, ModelState, Phase, Report
from app.request import Key, Request
from app.settings import Settings


class Engine:
    """Rows of any sampler, step count and guidance through shared forwards, on one device.

    `submit`, `cancel`, `load` and `stop` are thread-safe; the rest runs on the caller of `tick` or `run`.
    batcher, runner: of another order of work, for a bench. clock: seconds, monotonic; deadlines are on it.
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
        self._pool = pool
        self._emit = emit
        self._clock = clock
        profiles = profiles or Profiles(settings.cache, compiled=settings.compile)
        self._runner = runner(pool, profiles, settings.deterministic, text_bytes(settings), not settings.threads)
        self._batcher = batcher(self._caps, self._ready)
        self._turns = Turns(pool, lambda row: row.key in self._runner.limits.known)
        self._settler = Settler(self._batcher, self._runner, emit, clock, self._turns.served)
        self._promises = self._settler.promises
        self._unmeasured: dict[Key, None] = {}
        self._leaving: set[str] = set()
        self._memory = self._told = Memory(str(pool.device), self._runner.bytes)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sequence = itertools.count()
        self._patience = Patience(pool, emit, clock, settings.compile)
        self._stopping = self._draining = False

    def submit(self, request: Request) -> None:
        """Take the request; its Results or its Failure come through `emit`."""
        self._inbox.put(lambda: self._add(request))

    def cancel(self, request_id: str) -> None:
        """Drop the request at the next step boundary; a Failure with Cancelled follows. Unknown ids are ignored."""
        self._inbox.put(lambda: self._settler.fail(request_id, Cancelled("the request was cancelled")))

    def load(self, model_id: str) -> None:
        """Start loading a model that no request has asked for yet."""
        self._inbox.put(lambda: self._load(model_id))

    def unload(self, model_id: str) -> None:
        """Let a model go when no request for it is open."""
        self._inbox.put(lambda: self._leaving.add(model_id))

    def stop(self, drain: bool = False) -> None:
        """End `run`: at once, failing what is open, or with `drain` when the last open request is answered."""
        self._inbox.put(lambda: self._stop(drain))

    def run(self) -> None:
        """Turn until stopped. Announces before every silence how long it may last."""
        while not self._stopping and not (self._draining and not self._promises):
            if not self.tick():
                self._patience.idle()
                self._wait(0.1)
        for request_id in self._promises:
            self._settler.fail(request_id, ShuttingDown("the server is shutting down"))

    def tick(self) -> bool:
        """One turn; False when there was nothing to do."""
        self._read_inbox()
        self._poll_models()
        self._expire()
        self._ask_pool()
        work = self._batcher.next(self._clock())
        measured = self._measure_one()
        if work is None:
            return measured
        self._patience.begin(work)
        start = self._clock()
        outcome = self._runner.run(work)
        self._settler.settle(work, outcome, start)
        self._patience.end(work, outcome, self._clock() - start)
        return True

    def _ask_pool(self) -> None:
        """Started rows take hold of their network; what others lack is asked for, and who must wait for it is told."""
        rows = self._batcher.started
        for row in rows:
            self._runner.hold(row)
        for model in [model for model in self._leaving if not self._promises.of(model)]:
            self._leaving.discard(model)
            self._pool.unload(model)
        plan = self._turns.plan(standing(self._batcher.finished, rows), self._clock())
        self._pool.need(plan.needs, plan.kept)
        self._batcher.held = plan.held

    def _ready(self, model: str, phase: Phase) -> bool:
        """Whether rows may begin this phase; one that starts must find its network, where all parts fit together."""
        both = phase == "encode" and self._pool.fits(model)
        return self._pool.resident(model, phase) and (not both or self._pool.resident(model, "denoise"))

    def _caps(self, key: Key) -> Caps | None:
        """The caps of a key; one that has none is measured, a width a turn, and its rows wait until it is done."""
        caps = self._runner.caps(key)
        if caps is None:
            self._unmeasured[key] = None
        return caps

    def _measure_one(self) -> bool:
        """One width of one key that was asked for; whether there was such a key, and its network was there."""
        keys, self._unmeasured = list(self._unmeasured), {}
        for key in keys:
            if self._runner.limits.measurable(key):
                error = self._measure(key)
                if error:
                    self._fail_all(key.model, error, key)
                return True
        return False

    def _measure(self, key: Key) -> InstepError | None:
        """Measure one more width of a key; the error when its first forward fails."""
        self._patience.measure(key)
        start = self._clock()
        try:
            caps = self._runner.limits.measure(key)
        except InstepError as error:
            self._settler.unmeasured(key, error)
            return error
        self._patience.measured(key, self._clock() - start)
        if caps:
            self._emit(ModelState(key.model, "ready", rates={f"{key.width}x{key.height}": caps.rate}))
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

    def _load(self, model_id: str) -> None:
        self._leaving.discard(model_id)
        self._pool.want(model_id)

    def _add(self, request: Request) -> None:
        try:
            rows = rows_of(request, self._pool.cards, self._clock(), self._sequence)
        except InstepError as error:
            self._emit(Failure(request.id, error))
            return
        self._promises.make(request, rows)
        for row in rows:
            self._batcher.add(row)
            self._turns.add(row)
        self._pool.want(request.recipe.model)
        failure = self._pool.failure(request.recipe.model)
        if failure is not None:
            self._settler.fail(request.id, failure)

    def _poll_models(self) -> None:
        for change in self._pool.poll():
            if isinstance(change, ModelState):
                change = self._tried(change)
                error = self._pool.failure(change.model) if change.state == "failed" else None
                if error is not None:
                    self._fail_all(change.model, error)
                    self._runner.forget(change.model)
                elif change.state == "absent":
                    self._runner.tidy(change.model)
            self._memory = change if isinstance(change, Memory) else self._memory
            if not isinstance(change, Memory):
                self._emit(change)
        self._tell_memory()

    def _tried(self, state: ModelState) -> ModelState:
        """A model that becomes ready while nobody waits is measured first, or adds to what was measured before; it
        counts as failed if that fails."""
        if state.state != "ready":
            return state
        self._turns.loaded(state.model, state.seconds)
        self._patience.forget(state.model)
        key = default_key(self._pool.cards[state.model])
        error = None
        while not self._promises and self._inbox.empty() and error is None and self._runner.limits.measurable(key):
            error = self._measure(key)
        return replace(state, state="failed", detail=error.message) if error else state

    def _tell_memory(self) -> None:
        """What the device holds, when that has changed; the pool knows of weights, the runner of the rest."""
        held = replace(self._memory, bytes={**self._memory.bytes, **self._runner.bytes})
        if held != self._told:
            self._told = held
            self._emit(held)

    def _fail_all(self, model: str, error: InstepError, key: Key | None = None) -> None:
        for request_id in self._promises.of(model, key):
            self._settler.fail(request_id, error)

    def _expire(self) -> None:
        now = self._clock()
        late = [*self._promises.expired(now), *(row.request.id for row in self._batcher.doomed(now))]
        for request_id in late:
            self._settler.fail(request_id, DeadlineExceeded("the image cannot be done before its deadline"))

    def _stop(self, drain: bool) -> None:
        self._draining = drain
        self._stopping = not drain
