"""Loader: the one thread that builds models and moves their weights, as the books say.

Knows nothing of who waits or why. One thread: a shared component is never built twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import torch

from app.cards.card import Card
from app.cards.folder import Part
from app.checkpoints.parts import build_family, part_dtype, part_identity, part_outline, read_parts
from app.errors import DoesNotFit, LoadError
from app.families import FAMILIES
from app.families.compiling import compile_blocks
from app.families.components import has_weights
from app.pool.books import PHASES, Books, Bring, Build, Drop, Job
from app.pool.budget import readable
from app.pool.component import Component
from app.pool.threads import use_threads

_log = logging.getLogger(__name__)


class Loader:
    """Does the jobs of the books until they are closed."""

    def __init__(
        self, books: Books, cards: Mapping[str, Card], device: torch.device, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        self._books, self._cards, self._device, self._dtype = books, cards, device, dtype
        self._compiled = compiled
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the job that runs, at most so long."""
        self._thread.join(timeout=seconds)

    def _work(self) -> None:
        use_threads(1)  # for copies of weights; the cores are for those who run
        try:
            while job := self._next():
                self._do(job)
        except BaseException as error:
            with self._books.wake:
                self._books.broken = error

    def _next(self) -> Job | None:
        """The next job, waited for; None when the books are closed."""
        with self._books.wake:
            while not self._books.closed:
                if job := self._books.next():
                    return job
                self._books.wake.wait()
        return None

    def _do(self, job: Job) -> None:
        """What a job raises is its model's failure, and the thread's end only where the device is lost."""
        try:
            match job:
                case Drop(leaving):
                    self._drop(leaving)
                case Build(model_id):
                    self._build(model_id)
                case Bring():
                    self._bring(job)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if isinstance(job, Drop):  # what could not be emptied is no model's failure
                _log.exception("dropping weights")
                self._settle(job.leaving)
            else:
                self._fail(job.model, error)

    def _settle(self, leaving: list[Component]) -> None:
        with self._books.wake:
            for one in leaving:
                one.settle()

    def _build(self, model_id: str) -> None:
        """Everything but the weights: parts found, headers and configs checked, sizes known and compared."""
        start = time.monotonic()
        card = self._cards[model_id]
        found = read_parts(card, self._cards)
        # Networks before tokenizers, which take longest to read, so that files that lie are refused at once.
        found.sort(key=lambda part: (not has_weights(part.class_name), part.name not in FAMILIES[card.family].required))
        for part in found:
            if has_weights(part.class_name):
                part_outline(part)
        parts = {part.name: self._component(card, part) for part in found}
        family = build_family(card, {name: one.value for name, one in parts.items()}, self._device, self._dtype)
        if self._compiled:
            compile_blocks(family.network)
        with self._books.wake:
            model = self._books.models[model_id]
            model.family, model.parts = family, parts
            model.spent += time.monotonic() - start
            for one in parts.values():
                one.owners.add(model_id)
            sizes = {phase: sum(one.bytes for one in model.components((phase,))) for phase in PHASES}
        phase = max(PHASES, key=lambda phase: sizes[phase])
        if sizes[phase] > self._books.store.budget:
            raise DoesNotFit(
                f"{model_id}: what it needs to {phase} takes {readable(sizes[phase])}, and weights may take "
                f"{readable(self._books.store.budget)} of {self._device} (INSTEP_DEVICE_MEMORY)"
            )

    def _component(self, card: Card, part: Part) -> Component:
        dtype = part_dtype(part.name, self._device, self._dtype)
        key = (part_identity(part), dtype, FAMILIES[card.family].traits(card, part.name))
        known = self._books.store.components.get(key)
        if known is None:
            known = Component(part, self._device, dtype)
            with self._books.wake:
                self._books.store.components[key] = known
        return known

    def _bring(self, job: Bring) -> None:
        books, model, start = self._books, self._books.models[job.model], time.monotonic()
        left = books.store.bring(job.wanted, job.leaving)
        if "decode" in job.phases and "decode" not in model.brought and model.family is not None:
            with torch.inference_mode():
                model.family.prepare()
        with books.wake:
            model.brought.update(job.phases)
            model.spent += time.monotonic() - start
            if model.brought.issuperset(PHASES):
                books.loaded(job.model)
                if model.state != "ready":
                    books.change(job.model, "ready", seconds=model.spent)
            books.tell(left)

    def _drop(self, leaving: list[Component]) -> None:
        for one in leaving:
            self._books.store.drop(one)
        with self._books.wake:
            self._books.tell([(one, "away") for one in leaving])

    def _fail(self, model_id: str, error: Exception) -> None:
        """Record the reason, and empty the components that were loaded for this model alone."""
        # A new object: the caught one holds, by its traceback, all that was loaded until it was raised.
        told = _told(model_id, error, self._device)
        books = self._books
        with books.wake:
            model = books.models[model_id]
            alone = [one for one in model.parts.values() if one.owners == {model_id} and not one.leases and one.bytes]
            books.store.claim((), alone)
        for one in alone:
            books.store.drop(one)
        with books.wake:
            for one in model.parts.values():
                one.owners.discard(model_id)
            books.store.forget()
            model.family, model.parts, model.brought, model.error = None, {}, set(), told
            books.loaded(model_id)
            books.change(model_id, "failed", detail=told.message)
            books.tell(())


def _told(model_id: str, error: Exception, device: torch.device) -> LoadError:
    if isinstance(error, LoadError):
        return type(error)(error.message)
    if isinstance(error, torch.OutOfMemoryError):
        return LoadError(f"{model_id}: not enough memory on {device}")
    _log.error("loading %s", model_id, exc_info=error)
    return LoadError(f"{model_id}: cannot be loaded ({type(error).__name__})")
