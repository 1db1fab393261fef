"""Engine: the loop and the open requests: schedule, run, settle."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from app.cards.card import Card
from app.engine.batcher import Batcher, Turns
from app.engine.costs import Costs
from app.engine.row import Caps, Patience, Row, Work, default_key, rows_of
from app.engine.runner import Runner
from app.errors import Cancelled, DeadlineExceeded, InstepError, OutOfMemory, Unavailable
from app.pool.budget import parse_bytes
from app.pool.pool import Pool
from app.report import Failure, Memory, ModelState, Phase, Place, Preview, Progress, Report, Tick
from app.request import Key, Request
from app.settings import Settings


class Engine:
    """Rows of any sampler, step count and guidance through shared forwards, on one device.

    Orders (`submit`, `cancel`, `load`, `unload`, `reload`, `stop`) are thread-safe; the rest runs on the caller of
    `tick` or `run`. emit: receives every report. computes: is called before each work, as `Page.computes`. batcher,
    runner: of another order of work, for a bench. clock: seconds, monotonic; deadlines are on it.
    """

    def __init__(
        self,
        pool: Pool,
        settings: Settings,
        emit: Callable[[Report], None],
        *,
        computes: Callable[[list[Place], str], None] = lambda places, measured: None,
        costs: Costs | None = None,
        batcher: type[Batcher] = Batcher,
        runner: type[Runner] = Runner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._emit, self._clock = pool, emit, clock
        self._costs = costs or Costs(settings.cache, deterministic=settings.deterministic, compiled=settings.compile)
        texts = parse_bytes(settings.text_cache, None, "text_cache")
        self.runner = runner(pool, self._costs, settings.deterministic, texts, not settings.threads)
        self.batcher = batcher(self._caps, self._ready)
        self._turns = Turns(pool, self._costs.caps)
        self._patience = Patience(pool, emit, clock, settings.compile)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sequence = itertools.count()
        self._open: dict[str, list[Row]] = {}  # the rows without an image yet, by request
        self._loaded: dict[Key, ModelState] = {}  # models to report as ready once this key of theirs is measured
        self._measured_last = self._suspect = False
        self._leaving: set[str] = set()
        self._renewed: dict[str, Card] = {}  # cards that wait until no open request has the one before
        self._waiting: dict[str, Request] = {}  # requests that wait for them, in order
        self._memory = self._used()
        self._computes = computes
        # A GPU's error shows up to two works late.
        self._shown: deque[list[Place]] = deque(maxlen=1 if pool.device.type == "cpu" else 3)
        self._stopped = threading.Event()

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

    def reload(self, cards: Mapping[str, Card], log_level: str) -> None:
        """Take these cards: a changed one, or one with changed files, once no open request has the one before; later
        requests wait for that. A model that is no longer among them is unloaded; its card stays, for who still has it.
        """
        logging.getLogger().setLevel(log_level.upper())
        self._inbox.put(lambda: self._compare(cards))

    def stop(self) -> None:
        """End `run`, failing open requests."""
        self._inbox.put(self._stopped.set)

    def run(self) -> None:
        """Turn until stopped. Every silence is announced with the seconds that it may last."""
        while not self._stopped.is_set():
            if not self.tick():
                self._patience.idle()
                with contextlib.suppress(queue.Empty):
                    self._inbox.get(timeout=0.1)()
        for request_id in (*self._open, *self._waiting):
            self._fail(request_id, Unavailable("the server is shutting down", code="shutting_down"))

    def tick(self) -> bool:
        """Schedule a work, run it and settle it; False when there was nothing to do."""
        work = self._schedule()
        if work is None:
            if self._shown:
                self._finish_shown()
            return False
        self._run(work)
        self._settle(work)
        return True

    def _schedule(self) -> Work | None:
        """The next work, after news from outside. One width of a key without caps is measured between two others."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()
        self._renew()
        self._hear()
        now = self._clock()
        late = [row.request.id for row in self.batcher.late(now)]
        late += [name for name, one in self._waiting.items() if (one.delivery.deadline or now) < now]
        for name in late:
            self._fail(name, DeadlineExceeded("the image cannot be done before its deadline"))
        self._ask_pool()
        self.batcher.loading = bool(self._pool.loading)
        waiting = (queue.key for queue in self.batcher.queues.values() if not queue.empty)
        unmeasured = (Work("profile", key) for key in (*waiting, *self._loaded) if self._measurable(key))
        profile = next(unmeasured, None)
        first = profile if profile and not self._measured_last else self.batcher.next(self._clock())
        work = first or profile
        self._measured_last = work is not None and work.phase == "profile"
        return work

    def _run(self, work: Work) -> None:
        self._patience.begin(work)
        suspect, self._suspect = self._suspect, any(row.suspect for row in work.rows)
        if suspect or self._suspect:
            self._finish_shown()
        self._shown.append([row.place for row in work.rows])
        measured = "" if work.rows else f"{work.key.model} {work.key.size}"
        self._computes([place for places in self._shown for place in places], measured)
        work.start = self._clock()
        self.runner.run(work)
        work.seconds = self._clock() - work.start
        self._patience.end(work)

    def _finish_shown(self) -> None:
        """Wait until the device has done all works, so that none of them can fail any more."""
        self.runner.synchronize()
        self._shown.clear()
        self._computes([], "")

    def _settle(self, work: Work) -> None:
        """Move the rows of a work on, emit its images, answer what failed."""
        for row, error in work.failed:  # those of earlier forwards too, whatever this work is
            self._fail(row.request.id, error)
        if work.phase == "profile":
            self._settle_profile(work.key, work.error)
            return
        self.batcher.charge(work, work.seconds)
        if work.idle:
            return
        rows = [row for row in work.rows if row.stage != "gone"]
        end = work.start + work.seconds
        for row in rows if work.phase in ("source", "encode") else ():
            if not row.encode_start:
                row.encode_start = work.start
                row.queued += work.start - row.since
            if row.slot >= 0:
                row.since = end
                row.encoded += end - row.encode_start
                self.batcher.start(row)
                self.runner.hold(row)
        if work.phase == "denoise":
            self._settle_denoise(work, rows)
        for row, pixels, latents in work.images:
            if row.stage != "gone":
                row.decode_start = work.start
                self._answer(row)
                self._emit(row.result(pixels, latents, self._clock()))
        caps = self._costs.caps.get(work.key)
        self._emit(
            Tick(
                work.key.model, work.phase, len(work.rows), work.passes + work.padding, work.padding,
                caps.passes if caps else 0, work.seconds, self.batcher.running, self.batcher.waiting,
                work.key.width, work.key.height, work.out_of_memory, work.text_hits, work.text_misses,
                caps.rate if caps else 0.0,
            )
        )  # fmt: skip

    def _settle_profile(self, key: Key, error: InstepError | None) -> None:
        """Report the rate of a key once it is measured; its requests fail where the first forward did."""
        if isinstance(error, OutOfMemory):
            around = self.batcher.running, self.batcher.waiting, key.width, key.height
            self._emit(Tick(key.model, "denoise", 0, 0, 0, 0, 0.0, *around, out_of_memory=1))
        if error is not None:
            self._fail_all(key.model, error, key)
            if state := self._loaded.pop(key, None):
                self._emit(replace(state, state="failed", detail=error.message))
        elif caps := self._costs.caps.get(key):
            self._emit(ModelState(key.model, "ready", rates={key.size: caps.rate}))

    def _settle_denoise(self, work: Work, rows: list[Row]) -> None:
        if work.out_of_memory:
            self._costs.refuse(work.key, work.passes)
        elif not work.failed:
            self._costs.learn(work.key, work.passes, work.seconds, work.start + work.seconds)
        for row in rows:
            if row.line == row.begins:
                row.queued += work.start - row.since
            row.line += 1
            row.served += work.seconds
            row.neighbours += len(rows)
            if row.request.delivery.progress:
                self._emit(Progress(row.request.id, row.index, row.line, row.lines))
        if due := [row for row in rows if row.preview_due()]:
            for row, pixels in self.runner.preview(due):
                self._emit(Preview(row.request.id, row.index, row.previews, pixels))
            for row in due:
                row.previews += 1  # a preview that fails is left out: the image itself goes on
        for row in rows:
            if row.line == row.lines:
                self.batcher.finish(row)
                self.runner.rest(row)
            elif row.line == row.ends and row.stage != "gone":  # by the failure of another row of its request
                self._switch(row, work.start + work.seconds)

    def _switch(self, row: Row, now: float) -> None:
        """Release what a row holds of its leg's model and queue it for the next; fail it if memory runs out."""
        self._turns.served(row.key.model, now - row.encode_start)
        if error := self.runner.part(row):
            self._fail(row.request.id, error)
            return
        self.batcher.switch(row)
        row.since = now

    def _ask_pool(self) -> None:
        """Lease the network for every started row, ask the pool for the parts that other rows need, and tell the
        batcher which models may not start new rows."""
        rows, heads = self.batcher.started, self.batcher.heads()
        for row in rows:
            self.runner.hold(row)
        for row in [row for row in (*heads, *rows) if row.adapters and row.lease is None]:
            if error := self._pool.failure(row.key.model, row.adapters):
                self._fail(row.request.id, error)
        if self._leaving:
            for model in self._leaving - self._used_models():
                self._leaving.discard(model)
                self._pool.unload(model)
        self.batcher.paused = self._turns.ask(heads, self.batcher.finished, rows, self._clock())

    def _ready(self, model: str, phase: Phase, adapters: tuple[str, ...]) -> bool:
        """Whether rows may begin this phase; one that starts must find its network, where all parts fit together."""
        both = phase == "encode" and self._pool.fits(model, adapters)
        here = self._pool.resident(model, phase, adapters)
        return here and (not both or self._pool.resident(model, "denoise", adapters))

    def _caps(self, key: Key) -> Caps | None:
        """The caps of a key, with no slots while those of other keys leave no room; None before it is measured."""
        caps = self._costs.caps.get(key)
        return caps if caps is None or self.runner.slots.has_room(key, caps.bytes) else replace(caps, slots=0)

    def _measurable(self, key: Key) -> bool:
        """Whether a measurement would get on: it is not done, and the network, or the stored profile, is there."""
        if key in self._costs.caps or not (family := self._pool.family(key.model)):
            return False
        return self._pool.resident(key.model, "denoise") or self._costs.stored(family, key) is not None

    def _load(self, model_id: str) -> None:
        self._leaving.discard(model_id)
        self._pool.want(model_id)

    def _compare(self, cards: Mapping[str, Card]) -> None:
        gone = {name: card for name, card in self._renewed.items() if name not in cards}
        self._renewed = gone | {name: cards[name] for name in cards if not self._pool.keeps(name, cards)}
        self._leaving |= self._pool.cards.keys() - cards.keys()
        self._renew()

    def _renew(self) -> None:
        """Replace the cards that no open request has any more, and add the requests that waited for them."""
        for model in self._renewed.keys() - self._used_models():
            if self._pool.replace(self._renewed[model]):
                del self._renewed[model]
                self._costs.forget(model)
        for request in [one for one in self._waiting.values() if self._renewed.keys().isdisjoint(one.recipe.models)]:
            self._add(self._waiting.pop(request.id))

    def _used_models(self) -> set[str]:
        """The models of open requests, also those of past legs: all tables come from the first model's card."""
        return {model for rows in self._open.values() for model in rows[0].request.recipe.models}

    def _add(self, request: Request) -> None:
        if not self._renewed.keys().isdisjoint(request.recipe.models):
            self._waiting[request.id] = request
            return
        try:
            rows = rows_of(request, self._pool.cards, self._clock(), self._sequence)
        except InstepError as error:
            self._emit(Failure(request.id, error))
            return
        self._open[request.id] = rows
        for row in rows:
            self.batcher.add(row)
        for key, _ in rows[0].legs if rows else ():
            self._pool.want(key.model)
            if failure := self._pool.failure(key.model, rows[0].adapters if key == rows[0].key else ()):
                self._fail(request.id, _blaming(key.model, failure, rows))
                return

    def _answer(self, row: Row) -> None:
        """Drop a row that has its image."""
        self.batcher.remove(row)
        self.runner.release(row)
        self._turns.served(row.key.model, self._clock() - row.encode_start)
        self._open[row.request.id].remove(row)
        if not self._open[row.request.id]:
            del self._open[row.request.id]

    def _fail(self, request_id: str, error: InstepError) -> None:
        """Answer a request with an error and drop its rows; nothing for one that is answered already."""
        rows, waited = self._open.pop(request_id, []), self._waiting.pop(request_id, None)
        for row in rows:
            self.batcher.remove(row)
            self.runner.release(row)
        if rows or waited:
            self._emit(Failure(request_id, error))

    def _fail_all(self, model: str, error: InstepError, key: Key | None = None) -> None:
        """Fail the open requests with a row that needs a model, now or later, or one key of it."""
        for request_id, rows in list(self._open.items()):
            needed = (own for row in rows for own, _ in row.ahead)
            if any(own.model == model and key in (None, own) for own in needed):
                self._fail(request_id, _blaming(model, error, rows))

    def _hear(self) -> None:
        """Report what has happened in the pool, and the memory in use when that has changed.

        A model that became ready while no request is open is reported once its default size is measured.
        """
        for key in [key for key in self._loaded if not self._measurable(key)]:
            self._emit(self._loaded.pop(key))
        for change in self._pool.poll():
            if isinstance(change, ModelState):
                key = default_key(self._pool.cards[change.model])
                self._loaded.pop(key, None)
                self._change(change)
                if change.state == "ready" and not self._open and self._measurable(key):
                    self._loaded[key] = change
                    continue
            self._emit(change)
        memory = self._used()
        if memory != self._memory:
            self._memory = memory
            self._emit(memory)

    def _change(self, state: ModelState) -> None:
        """Drop what was learned of a model that was loaded again, failed or left the device."""
        if state.state == "ready":
            self._turns.loaded(state.model, state.seconds)
            self._patience.forget(state.model)
        if state.state == "failed" and (error := self._pool.failure(state.model)):
            self._fail_all(state.model, error)
            self._costs.forget(state.model)
        if state.state in ("failed", "absent"):  # now that its rows have left their slots
            self.runner.texts.forget(state.model)
            self.runner.slots.forget(state.model)

    def _used(self) -> Memory:
        return Memory({**self._pool.bytes, **self.runner.bytes})


def _blaming(model: str, error: InstepError, rows: list[Row]) -> InstepError:
    """The error of a model for the request of these rows, with the param `refiner` if the model is its refiner."""
    return error if model == rows[0].request.recipe.model else error.again(param="refiner")
