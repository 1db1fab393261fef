"""Pool: the models on one device, and the one thread that builds them and moves their weights.

Components (a network, a VAE, a text encoder) are what moves and what is leased; models that name the same one share it,
and because one thread builds them all, none is built twice.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from app.cards.card import Card
from app.cards.folder import Part
from app.checkpoints.parts import build_family, part_dtype, part_identity, part_outline, read_parts
from app.errors import LoadError
from app.families import FAMILIES
from app.families.compiling import compile_blocks
from app.families.components import has_weights
from app.pool.budget import readable, use_threads
from app.pool.memory import Component, Store
from app.pool.policy import PHASES, Policy, Task

_log = logging.getLogger(__name__)


class Pool(Policy):
    """The models of these cards on one device; a thread does the policy's tasks until the pool is closed.

    What is leased never moves. Of the rest, what was leased longest ago leaves first: to host memory beside a GPU,
    where it may take `host` bytes, and then away.
    """

    def __init__(
        self,
        cards: Mapping[str, Card],
        device: str,
        dtype: torch.dtype,
        *,
        budget: int = sys.maxsize,
        host: int = 0,
        compiled: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """dtype: of the networks; a VAE on the CPU is float32 always. budget: bytes that weights may take of the
        device. compiled: networks compile their blocks. clock: seconds, for the wait after a failure."""
        self.cards, self.device, self.dtype = dict(cards), torch.device(device), dtype
        # On a CPU the host's memory is the device's: there is nowhere to put weights aside.
        super().__init__(cards, device, Store(budget, host if self.device.type != "cpu" else 0), clock)
        self._compiled = compiled
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more loads, and wait a little for the running one."""
        with self.lock:
            self.closed = True
            self.lock.notify()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        use_threads(1)  # for copies of weights; the cores are for those who run
        try:
            while task := self._next():
                self._do(task)
        except BaseException as error:
            with self.lock:
                self.broken = error

    def _next(self) -> Task | None:
        """Wait for the next task; None when the policy is closed."""
        with self.lock:
            while not self.closed:
                if task := self.next():
                    return task
                self.lock.wait()
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
                self.store.settle(task.leaving)
            else:
                self._fail(task.model, error)

    def _drop(self, leaving: Sequence[Component]) -> None:
        for one in leaving:
            self.store.drop(one)
        with self.lock:
            self.moved((one, "away") for one in leaving)

    def _build(self, model_id: str) -> None:
        """Build all but the weights: find the parts, check headers and configs, compare the sizes with the budget."""
        start = time.monotonic()
        card = self.cards[model_id]
        found = read_parts(card, self.cards)
        # Networks before tokenizers, which take longest to read, so that files that lie are refused at once.
        found.sort(key=lambda part: (not has_weights(part.class_name), part.name not in FAMILIES[card.family].required))
        for part in found:
            if has_weights(part.class_name):
                part_outline(part)
        parts = {part.name: self._component(card, part) for part in found}
        family = build_family(card, {name: one.value for name, one in parts.items()}, self.device, self.dtype)
        if self._compiled:
            compile_blocks(family.network)
        with self.lock:
            model = self.models[model_id]
            model.family, model.parts = family, parts
            model.spent += time.monotonic() - start
            for one in parts.values():
                one.owners.add(model_id)
            sizes = {phase: sum(one.bytes for one in model.components((phase,))) for phase in PHASES}
        phase = max(PHASES, key=lambda phase: sizes[phase])
        if sizes[phase] > self.store.budget:
            raise LoadError(
                f"{model_id}: what it needs to {phase} takes {readable(sizes[phase])}, and weights may take "
                f"{readable(self.store.budget)} of {self.device} (INSTEP_DEVICE_MEMORY)",
                code="insufficient_gpu_memory",
            )

    def _component(self, card: Card, part: Part) -> Component:
        dtype = part_dtype(part.name, self.device, self.dtype)
        key = (part_identity(part), dtype, FAMILIES[card.family].traits(card, part.name))
        known = self.store.components.get(key)
        if known is None:
            known = Component(part, self.device, dtype)
            with self.lock:
                self.store.components[key] = known
        return known

    def _bring(self, task: Task) -> None:
        model, start = self.models[task.model], time.monotonic()
        left = self.store.bring(task.wanted, task.leaving)
        if "decode" in task.phases and "decode" not in model.brought and model.family is not None:
            with torch.inference_mode():
                model.family.prepare()
        with self.lock:
            model.brought.update(task.phases)
            model.spent += time.monotonic() - start
            if model.brought.issuperset(PHASES):
                self.end_load(task.model)
                if model.state != "ready":
                    self.change(task.model, "ready", seconds=model.spent)
            self.moved(left)

    def _fail(self, model_id: str, error: Exception) -> None:
        """Record the reason, and empty the components that only this model has."""
        reason = self._reason(model_id, error)
        model = self.models[model_id]
        with self.lock:
            alone = [one for one in model.parts.values() if one.owners == {model_id} and not one.leases and one.bytes]
            self.store.claim((), alone)
        for one in alone:
            self.store.drop(one)
        with self.lock:
            for one in model.parts.values():
                one.owners.discard(model_id)
            self.store.forget()
            model.family, model.parts, model.brought, model.error = None, {}, set(), reason
            self.end_load(model_id)
            self.change(model_id, "failed", detail=reason.message)
            self.moved(())

    def _reason(self, model_id: str, error: Exception) -> LoadError:
        """A new error for users: the traceback of the caught one holds all that was loaded until it was raised."""
        if isinstance(error, LoadError):
            return error.again()
        if isinstance(error, torch.OutOfMemoryError):
            return LoadError(f"{model_id}: not enough memory on {self.device}")
        _log.error("loading %s", model_id, exc_info=error)
        return LoadError(f"{model_id}: cannot be loaded ({type(error).__name__})")
