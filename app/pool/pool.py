"""Pool: the models on one device, leases of their components, and the one thread that builds and moves them.

Components (a network, a VAE, a text encoder) are what moves and what is leased; models that name the same one share it,
and because one thread builds them all, none is built twice.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import ByteSize

from app.cards.card import Card
from app.cards.folder import Part
from app.checkpoints.parts import build_family, part_dtype, part_identity, part_outline, read_parts
from app.errors import LoadError, ModelNotFound
from app.families import FAMILIES
from app.families.base import Family
from app.families.compiling import compile_blocks
from app.families.components import has_weights
from app.pool.memory import Component, Place
from app.pool.policy import PHASES, Model, Parts, Policy, Task, claim, here
from app.report import Evicted, ModelState, Phase, State

RETRY_AFTER = 30.0
"""Seconds after a failed load before it is tried again."""

_log = logging.getLogger(__name__)


class Pool:
    """The models of these cards on one device; a thread does the policy's tasks until the pool is closed.

    What is leased never moves. Of the rest, what was leased longest ago leaves first: to host memory beside a GPU,
    where it may take `host` bytes, and then away. Public methods are thread-safe and return at once; those that take
    the id of a model raise ModelNotFound.
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
        self.models = {model_id: Model() for model_id in cards}
        # On a CPU the host's memory is the device's: there is nowhere to put weights aside.
        self.policy = Policy(self.models, budget, host if self.device.type != "cpu" else 0)
        self.lock = threading.Condition()
        self._compiled, self._clock = compiled, clock
        self._changes: list[ModelState | Evicted] = []
        self._closed = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more loads, and wait a little for the running one."""
        with self.lock:
            self._closed = True
            self.lock.notify()
        self._thread.join(timeout=5)

    def want(self, model_id: str) -> None:
        """Start loading in the background if absent, in part or whole, or if the last load failed over 30 s ago."""
        policy = self.policy
        with self.lock:
            model = self._model(model_id)
            policy.dropped.discard(model_id)
            retry = model.state == "failed" and self._clock() - model.since >= RETRY_AFTER
            robbed = model.state == "ready" and model.on_device < model.bytes <= self.policy.budget
            if model.state == "absent" or retry:
                model.error, model.spent = None, 0.0
                self._change(model_id, "loading")
            elif not robbed or model_id in policy.loads:
                return
            policy.loads.append(model_id)
            self.lock.notify()

    def unload(self, model_id: str) -> None:
        """Take the model off the device and out of host memory, once nobody leases it."""
        with self.lock:
            if self._model(model_id).state == "loading":
                self.policy.loaded(model_id)
                self._change(model_id, "absent")
            self.policy.dropped.add(model_id)
            self.policy.needs = []  # rows that wait for it ask again
            self.lock.notify()

    def need(self, waiting: Sequence[Parts], kept: Collection[str] = (), urgent: Sequence[Parts] = ()) -> None:
        """Replace what rows wait for. kept: models whose components stay. urgent: needs of rows that hold memory on
        the device, which come first and spare no model. What is needed is brought in order, one each call; until the
        next call nothing else moves."""
        policy, stays = self.policy, frozenset(kept)
        needs = [(*parts, frozenset[str]()) for parts in urgent] + [(*parts, stays) for parts in waiting]
        with self.lock:
            if policy.fresh and (needs, stays) == (policy.needs, policy.kept):
                return
            policy.needs, policy.kept, policy.fresh = needs, stays, True
            for model_id, *_ in needs:
                policy.dropped.discard(model_id)
                if self._model(model_id).state == "absent":
                    self.want(model_id)
            self.lock.notify()

    def components(self, model_id: str, *phases: Phase) -> list[Component]:
        """What these phases of a model need on the device; nothing until the model was built."""
        return self._model(model_id).components(phases)

    def lease(self, components: Collection[Component]) -> bool:
        """Forbid these to move until they are released; False, and nothing is leased, while one is not here."""
        with self.lock:
            if not all(here(one) for one in components):
                return False
            for one in components:
                one.leases += 1
                one.used = time.monotonic()
            return True

    def release(self, components: Collection[Component]) -> None:
        """End one lease of each."""
        with self.lock:
            for one in components:
                one.leases -= 1
            self.lock.notify()

    def resident(self, model_id: str, phase: Phase) -> bool:
        """Whether the model is ready and all components of the phase are on the device."""
        with self.lock:
            return self._model(model_id).has((phase,))

    @property
    def blocked(self) -> bool:
        """Whether the first need that is not met waits for something that is leased or kept."""
        return self.policy.blocked

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of weights on the device and put aside in host memory, and what they may take of the device."""
        with self.lock:
            return {"weights": self.policy.used, "parked": self.policy.parked, "budget": self.policy.budget}

    def family(self, model_id: str) -> Family | None:
        """The model as code and configuration, wherever its weights are; None until it was built."""
        return self._model(model_id).family

    def version(self, network: object) -> int:
        """The version of the weights of a leased network; another number once their files had changed."""
        with self.lock:
            return next((one.version for one in self.policy.components if one.value is network), 0)

    def fits(self, model_id: str) -> bool:
        """Whether all components of a built model can be on the device together."""
        return self.size(model_id) <= self.policy.budget

    def size(self, model_id: str) -> int:
        """Bytes of the weights of all components; 0 until the model was built."""
        return self._model(model_id).bytes

    def failure(self, model_id: str) -> LoadError | None:
        """Why the last load failed; None when it did not or is being tried again."""
        return self._model(model_id).error

    def poll(self) -> list[ModelState | Evicted]:
        """The changes since the last call, in order. Raises the error that ended the loader: a device that is lost."""
        with self.lock:
            if self._broken:
                raise self._broken
            changes, self._changes = self._changes, []
        return changes

    def fail(self, model_id: str, error: Exception) -> None:
        """Record why the model cannot be used, and empty the components that only this model has."""
        reason = self._reason(model_id, error)
        model = self.models[model_id]
        with self.lock:
            alone = [one for one in model.parts.values() if one.owners == {model_id} and not one.leases and one.bytes]
            claim(alone)
        for one in alone:
            self.drop(one)
        with self.lock:
            for one in model.parts.values():
                one.owners.discard(model_id)
            self.policy.forget()
            model.family, model.parts, model.brought, model.error = None, {}, set(), reason
            self.policy.loaded(model_id)
            self._change(model_id, "failed", detail=reason.message)

    def _model(self, model_id: str) -> Model:
        try:
            return self.models[model_id]
        except KeyError:
            raise ModelNotFound(f'no model "{model_id}"', param="model") from None

    def _change(self, model_id: str, state: State, detail: str = "", seconds: float = 0.0) -> None:
        """Set and report the state of a model. Under the lock."""
        model = self.models[model_id]
        model.state, model.since = state, self._clock()
        self._changes.append(ModelState(model_id, state, detail, seconds, model.on_device))

    def _left(self, components: Iterable[Component]) -> None:
        """Report what left the device, and the models that became absent by it. Under the lock."""
        for one in components:
            for model_id in sorted(one.owners):
                model = self.models[model_id]
                to: Literal["host", "away"] = "host" if one.place == "host" else "away"
                self._changes.append(Evicted(model_id, one.part.name, to, one.bytes))
                if model.state == "ready" and not model.on_device:
                    self._change(model_id, "absent", detail="evicted")

    def _work(self) -> None:
        use_threads(1)  # for copies of weights; the cores are for those who run
        try:
            while task := self._next():
                self._do(task)
        except BaseException as error:
            with self.lock:
                self._broken = error

    def _next(self) -> Task | None:
        """Wait for the next task; None when the pool is closed."""
        with self.lock:
            while not self._closed:
                if task := self.policy.next():
                    return task
                self.lock.wait()
        return None

    def _do(self, task: Task) -> None:
        """Do a task; an error is its model's failure, and ends the thread only where the device is lost."""
        try:
            {"build": self._build, "bring": self._bring, "drop": self._drop}[task.kind](task)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if task.kind == "drop":  # an error while weights are freed is no model's failure
                _log.exception("dropping weights")
                self._settle(task.leaving)
            else:
                self.fail(task.model, error)

    def _build(self, task: Task) -> None:
        """Build all but the weights: find the parts, check headers and configs, compare the sizes with the budget."""
        start, card, model = time.monotonic(), self.cards[task.model], self.models[task.model]
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
            model.family, model.parts = family, parts
            model.spent += time.monotonic() - start
            for one in parts.values():
                one.owners.add(task.model)
        sizes = {phase: sum(one.bytes for one in model.components((phase,))) for phase in PHASES}
        phase = max(PHASES, key=lambda phase: sizes[phase])
        if sizes[phase] > self.policy.budget:
            needed, budget = (ByteSize(size).human_readable(True) for size in (sizes[phase], self.policy.budget))
            raise LoadError(
                f"{task.model}: what it needs to {phase} takes {needed}, and weights may take {budget} of "
                f"{self.device} (INSTEP_DEVICE_MEMORY)",
                code="insufficient_gpu_memory",
            )

    def _component(self, card: Card, part: Part) -> Component:
        """The component of a part, which cards share that differ in nothing that changes it."""
        dtype = part_dtype(part.name, self.device, self.dtype)
        key = (part_identity(part), dtype, FAMILIES[card.family].traits(card, part.name))
        found = next((one for one in self.policy.components if one.key == key), None)
        if found is None:
            found = Component(part, self.device, dtype, key)
            with self.lock:
                self.policy.components.append(found)
        return found

    def _bring(self, task: Task) -> None:
        model, start = self.models[task.model], time.monotonic()
        if model.state == "absent":
            with self.lock:
                model.spent = 0.0
                self._change(task.model, "loading")
        self.move(task.wanted, task.leaving)
        if "decode" in task.phases and "decode" not in model.brought and model.family is not None:
            with torch.inference_mode():
                model.family.prepare()
        with self.lock:
            model.brought.update(task.phases)
            model.spent += time.monotonic() - start
            if model.brought.issuperset(PHASES):
                self.policy.loaded(task.model)
                if model.state != "ready":
                    self._change(task.model, "ready", seconds=model.spent)
            self._left(task.leaving)

    def _drop(self, task: Task) -> None:
        for one in task.leaving:
            self.drop(one)
        with self.lock:
            self._left(task.leaving)
            if not task.leaving and self.models[task.model].state == "ready":  # what it shares with others stays
                self._change(task.model, "absent", detail="unloaded")

    def move(self, wanted: Sequence[Component], leaving: Sequence[Component]) -> None:
        """Move claimed components out and in. Raises what loading raises; what did not arrive is then away."""
        try:
            for one in leaving:
                self.put_aside(one)
            for one in wanted:
                if one.moving:
                    one.arrive()
                    self._moved(one, "device")
        finally:
            self._settle((*leaving, *wanted))

    def put_aside(self, one: Component) -> None:
        """Move a claimed component off the device: to host memory when it fits there, else away."""
        with self.lock:
            parting = self.policy.room_aside(one)
            claim(parting or ())
        for other in parting or ():
            self.drop(other)
        if parting is not None and one.park():
            self._moved(one, "host")
        else:
            self.drop(one)

    def drop(self, one: Component) -> None:
        """Free a claimed component, wherever it was."""
        one.leave()
        self._moved(one, "away")

    def _moved(self, one: Component, place: Place) -> None:
        with self.lock:
            one.place, one.moving = place, False

    def _settle(self, claimed: Iterable[Component]) -> None:
        """Free what is still on its way, after an error."""
        for one in claimed:
            if one.moving:
                self.drop(one)

    def _reason(self, model_id: str, error: Exception) -> LoadError:
        """A new error for users: the traceback of the caught one holds all that was loaded until it was raised."""
        if isinstance(error, LoadError):
            return error.again()
        if isinstance(error, torch.OutOfMemoryError):
            return LoadError(f"{model_id}: not enough memory on {self.device}")
        _log.error("loading %s", model_id, exc_info=error)
        return LoadError(f"{model_id}: cannot be loaded ({type(error).__name__})")


def use_threads(count: int) -> None:
    """Let the calling thread compute with so many threads, whatever other threads ask for before or after.

    NOTE: a thread takes the number that was set last anywhere in the process when it first computes or asks for it,
    hence the question here. With more threads than cores in all, an engine drew at half its speed: OpenMP lets each
    thread fall asleep after every parallel region.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()
