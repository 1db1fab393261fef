"""Loader: the one thread that builds models and moves their weights, so that a shared part is never built twice."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from app.cards.card import Card
from app.cards.folder import Part
from app.checkpoints.parts import build_family, part_dtype, part_identity, part_outline, read_parts
from app.errors import DoesNotFit, LoadError
from app.families import FAMILIES
from app.families.compiling import compile_blocks
from app.families.components import has_weights
from app.pool.budget import readable, use_threads
from app.pool.memory import Component
from app.pool.policy import PHASES, Policy, Task

_log = logging.getLogger(__name__)


class Loader:
    """Does the policy's tasks until it is closed."""

    def __init__(
        self, policy: Policy, cards: Mapping[str, Card], device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> None:
        self._policy, self._store, self._lock = policy, policy.store, policy.lock
        self._cards, self._device, self._dtype, self._compiled = cards, device, dtype, compiled
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the running task, at most so long."""
        self._thread.join(timeout=seconds)

    def _work(self) -> None:
        use_threads(1)  # for copies of weights; the cores are for those who run
        try:
            while task := self._next():
                self._do(task)
        except BaseException as error:
            with self._lock:
                self._policy.broken = error

    def _next(self) -> Task | None:
        """Wait for the next task; None when the policy is closed."""
        with self._lock:
            while not self._policy.closed:
                if task := self._policy.next():
                    return task
                self._lock.wait()
        return None

    def _do(self, task: Task) -> None:
        """Do a task; an error is its model's failure, and ends the thread only where the device is lost."""
        try:
            if task.kind == "build":
                self._build(task.model)
            elif task.kind == "bring":
                self._bring(task)
            else:
                self._drop(task.leaving)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if task.kind == "drop":  # an error while weights are freed is no model's failure
                _log.exception("dropping weights")
                self._store.settle(task.leaving)
            else:
                self._fail(task.model, error)

    def _drop(self, leaving: Sequence[Component]) -> None:
        for one in leaving:
            self._store.drop(one)
        with self._lock:
            self._policy.moved((one, "away") for one in leaving)

    def _build(self, model_id: str) -> None:
        """Build all but the weights: find the parts, check headers and configs, compare the sizes with the budget."""
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
        with self._lock:
            model = self._policy.models[model_id]
            model.family, model.parts = family, parts
            model.spent += time.monotonic() - start
            for one in parts.values():
                one.owners.add(model_id)
            sizes = {phase: sum(one.bytes for one in model.components((phase,))) for phase in PHASES}
        phase = max(PHASES, key=lambda phase: sizes[phase])
        if sizes[phase] > self._store.budget:
            raise DoesNotFit(
                f"{model_id}: what it needs to {phase} takes {readable(sizes[phase])}, and weights may take "
                f"{readable(self._store.budget)} of {self._device} (INSTEP_DEVICE_MEMORY)"
            )

    def _component(self, card: Card, part: Part) -> Component:
        dtype = part_dtype(part.name, self._device, self._dtype)
        key = (part_identity(part), dtype, FAMILIES[card.family].traits(card, part.name))
        known = self._store.components.get(key)
        if known is None:
            known = Component(part, self._device, dtype)
            with self._lock:
                self._store.components[key] = known
        return known

    def _bring(self, task: Task) -> None:
        policy, model, start = self._policy, self._policy.models[task.model], time.monotonic()
        left = self._store.bring(task.wanted, task.leaving)
        if "decode" in task.phases and "decode" not in model.brought and model.family is not None:
            with torch.inference_mode():
                model.family.prepare()
        with self._lock:
            model.brought.update(task.phases)
            model.spent += time.monotonic() - start
            if model.brought.issuperset(PHASES):
                policy.end_load(task.model)
                if model.state != "ready":
                    policy.change(task.model, "ready", seconds=model.spent)
            policy.moved(left)

    def _fail(self, model_id: str, error: Exception) -> None:
        """Record the reason, and empty the components that only this model has."""
        reason = self._reason(model_id, error)
        policy, model = self._policy, self._policy.models[model_id]
        with self._lock:
            alone = [one for one in model.parts.values() if one.owners == {model_id} and not one.leases and one.bytes]
            self._store.claim((), alone)
        for one in alone:
            self._store.drop(one)
        with self._lock:
            for one in model.parts.values():
                one.owners.discard(model_id)
            self._store.forget()
            model.family, model.parts, model.brought, model.error = None, {}, set(), reason
            policy.end_load(model_id)
            policy.change(model_id, "failed", detail=reason.message)
            policy.moved(())

    def _reason(self, model_id: str, error: Exception) -> LoadError:
        """A new error for users: the traceback of the caught one holds all that was loaded until it was raised."""
        if isinstance(error, LoadError):
            return type(error)(error.message)
        if isinstance(error, torch.OutOfMemoryError):
            return LoadError(f"{model_id}: not enough memory on {self._device}")
        _log.error("loading %s", model_id, exc_info=error)
        return LoadError(f"{model_id}: cannot be loaded ({type(error).__name__})")
