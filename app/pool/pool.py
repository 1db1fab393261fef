"""Pool: the models on one device, leases of their components, and the one thread that builds and moves them.

Components (a network, a VAE, a text encoder) are what moves and what is leased; models that name the same one share it,
and because one thread builds them all, none is built twice.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, cast

import torch

from app.cards.card import WORDS, Card
from app.checkpoints.parts import read_parts
from app.errors import InstepError, LoadError, ModelNotFound
from app.families.adapters import LoRA
from app.families.base import Family
from app.pool.budget import use_threads
from app.pool.builder import Builder
from app.pool.memory import Component, Place, load_error
from app.pool.policy import PHASES, Kept, Model, Parts, Policy, Task, claim, here
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
        loads: Callable[[str], None] = lambda model: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """dtype: of the networks; a VAE on the CPU is float32 always. budget: bytes that weights may take of the
        device. compiled: networks compile their blocks. loads: is called before and after each task of the loader, as
        `Page.loads`. clock: seconds, for the wait after a failure."""
        self.cards, self.device, self.dtype = dict(cards), torch.device(device), dtype
        self.models = {model_id: Model() for model_id in cards}
        # On a CPU the host's memory is the device's: there is nowhere to put weights aside.
        self.policy = Policy(self.models, budget, host if self.device.type != "cpu" else 0)
        self.lock = threading.Condition()
        self.loading = ""  # the model of the loader's task
        self._builder = Builder(self.policy, self.lock, self.device, dtype, compiled)
        self._loads, self._clock = loads, clock
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

    def need(self, waiting: Sequence[Parts], kept: Collection[Kept] = (), urgent: Sequence[Parts] = ()) -> None:
        """Replace what rows wait for. kept: models and adapters that stay. urgent: needs of rows that hold memory on
        the device, which come first and spare no model. What is needed is brought in order, one each call; until the
        next call nothing else moves."""
        policy, stays = self.policy, frozenset(kept)
        needs = [(parts, frozenset[Kept]()) for parts in urgent] + [(parts, stays) for parts in waiting]
        with self.lock:
            if policy.fresh and (needs, stays) == (policy.needs, policy.kept):
                return
            policy.needs, policy.kept, policy.fresh = needs, stays, True
            for (model_id, *_), _ in needs:
                policy.dropped.discard(model_id)
                if self._model(model_id).state == "absent":
                    self.want(model_id)
            self.lock.notify()

    def components(self, model_id: str, *phases: Phase, adapters: Collection[str] = ()) -> list[Component]:
        """What these phases of a model need on the device; nothing until the model was built."""
        with self.lock:  # the loader takes the parts of a model away when it fails
            return self._model(model_id).components(phases, adapters)

    def adapter(self, model_id: str, name: str) -> LoRA:
        """The weights of an adapter that was on the device. Raises LoadError."""
        if name not in self._model(model_id).adapters:
            raise LoadError(f"{name}: the adapter is gone")
        return cast(LoRA, self._model(model_id).adapters[name].value)

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
            self._discard(components)
            self.lock.notify()

    def resident(self, model_id: str, phase: Phase, adapters: Collection[str] = ()) -> bool:
        """Whether the model is ready and all components of the phase are on the device."""
        with self.lock:
            return self._model(model_id).has((phase,), adapters)

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

    def fits(self, model_id: str, adapters: Collection[str] = ()) -> bool:
        """Whether all components of a built model can be on the device together."""
        model = self._model(model_id)
        beside = sum(model.adapters[name].bytes for name in adapters if name in model.adapters)
        return model.bytes + beside <= self.policy.budget

    def size(self, model_id: str) -> int:
        """Bytes of the weights of all components; 0 until the model was built."""
        return self._model(model_id).bytes

    def failure(self, model_id: str, adapters: Collection[str] = ()) -> LoadError | None:
        """Why the last load failed; None when it did not or is being tried again."""
        with self.lock:
            model = self._model(model_id)
            model.faults = {n: one for n, one in model.faults.items() if self._clock() - one[1] < RETRY_AFTER}
            return model.error or self.policy.fault(model_id, str(self.device), adapters)

    def poll(self) -> list[ModelState | Evicted]:
        """The changes since the last call, in order. Raises the error that ended the loader: a device that is lost."""
        with self.lock:
            if self._broken:
                raise self._broken
            changes, self._changes = self._changes, []
        return changes

    def fail(self, model_id: str, error: Exception) -> None:
        """Record why the model cannot be used, and empty the components that only this model has."""
        reason = load_error(model_id, error, self.device)
        self._empty(model_id)
        with self.lock:
            self.models[model_id].error = reason
            self._change(model_id, "failed", detail=reason.message)

    def keeps(self, model_id: str, cards: Mapping[str, Card]) -> bool:
        """Take the model's card among these and return True, if it has the same parts as before and has not failed."""
        new, model = cards[model_id], self.models.get(model_id)
        old = self.cards.get(model_id, new)
        new = new.model_copy(update={"adapters": old.adapters | new.adapters})  # rows may still ask for the old ones
        if not model or model.state == "failed" or old.model_dump(exclude=WORDS) != new.model_dump(exclude=WORDS):
            return False
        with suppress(InstepError):  # what is loaded stays where the files are not whole
            keys = {one.key for one in model.parts.values()}
            if keys and keys != {self._builder.key(new, part) for part in read_parts(new, cards)}:
                return False
        with self.lock:
            model.faults = {}  # their files may be whole now
            for name in [name for name, one in model.adapters.items() if one.adapter.stamp != new.adapters[name].stamp]:
                self._leave_out(model_id, name)
        self.cards[model_id] = new
        return True

    def replace(self, card: Card) -> bool:
        """Take this card for the model of its id, loaded again unless absent; False while the loader works on it."""
        with self.lock:
            old = self.models.setdefault(card.id, Model())
            if self.loading == card.id or any(one.moving for one in old.all):
                return False
            self._empty(card.id)
            self.policy.dropped.discard(card.id)
            self.cards[card.id], self.models[card.id], self.policy.needs = card, Model(), []
            if old.state != "absent":
                self._change(card.id, "absent", "reloaded")
                self.want(card.id)
        return True

    def _leave_out(self, model_id: str, adapter: str) -> None:
        """Take an adapter from a model: the next row that asks for it has it built anew."""
        with self.lock:
            if one := self.models[model_id].adapters.pop(adapter, None):
                one.owners.discard(model_id)
                self._discard([one])

    def _discard(self, components: Collection[Component]) -> None:
        """Free and remove those that no model has any more, once they neither move nor are leased. Under the lock."""
        for one in [one for one in components if not (one.owners or one.leases or one.moving)]:
            self.drop(one)
            self.policy.components = [other for other in self.policy.components if other is not one]

    def _empty(self, model_id: str) -> None:
        """Take its components from a model, and empty those that only this model has."""
        with self.lock:
            parts = self.models[model_id].all
            for one in [one for one in parts if one.owners == {model_id} and not one.leases and one.bytes]:
                self.drop(one)
            self.policy.forget(model_id)

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
                task = self.policy.next()
                self.loading = task.model if task else ""
                self._loads(self.loading)
                if task:
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
            elif task.adapter:
                self._leave_out(task.model, task.adapter)
                fault = load_error(task.adapter, error, self.device)
                fault.code, fault.param = "lora_load_failed", f"loras.{task.adapter}"
                with self.lock:  # the engine goes through them
                    self.models[task.model].faults[task.adapter] = fault, self._clock()
            else:
                self.fail(task.model, error)

    def _build(self, task: Task) -> None:
        """Build all but the weights, and compare the sizes with the budget."""
        start, card, model = time.monotonic(), self.cards[task.model], self.models[task.model]
        if task.adapter:
            return self._builder.adapter(card, model, task.adapter)
        family, parts = self._builder.model(card, self.cards)
        with self.lock:
            model.family, model.parts = family, parts
            model.spent += time.monotonic() - start
            for one in parts.values():
                one.owners.add(task.model)
        self.policy.check_size(task.model, str(self.device))

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

    def _settle(self, claimed: Collection[Component]) -> None:
        """Free what is still on its way, after an error."""
        with self.lock:
            for one in [one for one in claimed if one.moving]:
                self.drop(one)
            self._discard(claimed)
