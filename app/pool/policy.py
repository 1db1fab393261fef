"""Policy: which weights should be on the device, who leases them, and what the loader does next; no tensors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from app.errors import LoadError, ModelNotFound
from app.report import Evicted, Memory, ModelState, Phase, State

if TYPE_CHECKING:
    from app.families.base import Family
    from app.pool.memory import Component, Place, Store

RETRY_AFTER = 30.0
"""Seconds after a failed load before it is tried again."""

PHASES: tuple[Phase, ...] = ("decode", "encode", "denoise")
"""The order of a first load: the VAE first, because the map of previews is fitted with it."""

Change = ModelState | Evicted | Memory
Parts = tuple[str, tuple[Phase, ...]]
"""A model, and the phases whose parts rows wait for."""


class Lease:
    """A hold on the parts of one phase of a model."""

    def __init__(self, model: Family, parts: list[Component], lock: threading.Condition) -> None:
        self.model = model
        self._parts, self._lock = parts, lock

    def release(self) -> None:
        """End the hold; later calls do nothing."""
        with self._lock:
            for one in self._parts:
                one.leases -= 1
            self._parts = []
            self._lock.notify()


class Task(NamedTuple):
    """What the loader does next; components are claimed. build: find the parts of a model and check their headers.

    bring: move `leaving` off the device, and what is missing of `wanted` in. drop: free `leaving`.
    """

    kind: Literal["build", "bring", "drop"]
    model: str = ""
    phases: tuple[Phase, ...] = ()
    wanted: Sequence[Component] = ()
    leaving: Sequence[Component] = ()


@dataclass
class Model:
    """The state of a model. brought: the phases whose parts were on the device since it was built.

    spent: the loader's seconds on this load so far, without those in which it waited for room.
    """

    state: State = "absent"
    family: Family | None = None
    parts: dict[str, Component] = field(default_factory=dict)
    brought: set[Phase] = field(default_factory=set)
    error: LoadError | None = None
    since: float = 0.0
    spent: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.parts.values())

    @property
    def on_device(self) -> int:
        return sum(one.bytes for one in self.parts.values() if one.place == "device")

    def components(self, phases: Collection[Phase]) -> list[Component]:
        """The parts with weights that these phases need; none before it is built."""
        names = [name for phase in PHASES if phase in phases and self.family for name in self.family.phases[phase]]
        return [self.parts[name] for name in names if name in self.parts]

    def has(self, phases: Collection[Phase]) -> bool:
        """Whether the model is ready and all parts of these phases are on the device."""
        return self.state == "ready" and all(one.place == "device" for one in self.components(phases))

    def first(self, budget: int) -> tuple[Phase, ...]:
        """The phases that a load brings next: all, or one after the other when they do not fit together."""
        if self.bytes <= budget:
            return PHASES
        return next(((phase,) for phase in PHASES if phase not in self.brought), ("denoise",))


class Policy:
    """The models, what is wanted of them, and the changes not reported yet. A method with an id raises ModelNotFound.

    All but the loader's methods (`next`, `end_load`, `change`, `moved`, called under `lock`) are thread-safe and return
    at once; `lock` is notified when there may be work. blocked: the first need that is not met waits for something
    leased or kept. broken: the error that ended the loader, if one did.
    """

    def __init__(self, models: Iterable[str], device: str, store: Store, clock: Callable[[], float]) -> None:
        self.models = {model_id: Model() for model_id in models}
        self.store, self.lock = store, store.lock
        self.changes: list[Change] = []
        self.closed = self.blocked = False
        self.broken: BaseException | None = None
        self._device, self._clock = device, clock
        self._loads: list[str] = []
        self._dropped: set[str] = set()
        self._needs: list[tuple[str, tuple[Phase, ...], frozenset[str]]] = []  # the last: models whose parts stay
        self._kept = frozenset[str]()
        self._fresh = True

    def model(self, model_id: str) -> Model:
        try:
            return self.models[model_id]
        except KeyError:
            raise ModelNotFound(f'no model "{model_id}"', param="model") from None

    def want(self, model_id: str) -> None:
        """Start loading in the background if absent, in part or whole, or if the last load failed over 30 s ago."""
        with self.lock:
            model = self.model(model_id)
            self._dropped.discard(model_id)
            retry = model.state == "failed" and self._clock() - model.since >= RETRY_AFTER
            robbed = model.state == "ready" and model.on_device < model.bytes <= self.store.budget
            if model.state == "absent" or retry:
                model.error, model.spent = None, 0.0
                self.change(model_id, "loading")
            elif not robbed or model_id in self._loads:
                return
            self._loads.append(model_id)
            self.lock.notify()

    def unload(self, model_id: str) -> None:
        """Take the model off the device and out of host memory, once nobody leases it."""
        with self.lock:
            if self.model(model_id).state == "loading":
                self.end_load(model_id)
                self.change(model_id, "absent")
            self._dropped.add(model_id)
            self._needs = []  # rows that wait for it ask again
            self.lock.notify()

    def need(self, waiting: Sequence[Parts], kept: Collection[str] = (), urgent: Sequence[Parts] = ()) -> None:
        """Replace what rows wait for. kept: models whose parts stay. urgent: what rows wait for that hold memory
        already; it comes before the rest, and nothing unleased stays in its way.

        Rows that waited must lease what came before the next call: until then nothing else moves.
        """
        stays = frozenset(kept)
        needs = [(*parts, frozenset[str]()) for parts in urgent] + [(*parts, stays) for parts in waiting]
        with self.lock:
            if self._fresh and (needs, stays) == (self._needs, self._kept):
                return
            self._needs, self._kept, self._fresh = needs, stays, True
            for model_id, *_ in needs:
                self._dropped.discard(model_id)
                if self.model(model_id).state == "absent":
                    self.want(model_id)
            self.lock.notify()

    def lease(self, model_id: str, phase: Phase) -> Lease | None:
        """A hold on the parts of a phase, or None while they are not all on the device."""
        with self.lock:
            model = self.model(model_id)
            if model.family is None or not model.has((phase,)):
                return None
            leased = model.components((phase,))
            for one in leased:
                one.leases += 1
                one.used = time.monotonic()
            return Lease(model.family, leased, self.lock)

    def resident(self, model_id: str, phase: Phase) -> bool:
        """Whether `lease` would succeed now."""
        with self.lock:
            return self.model(model_id).has((phase,))

    def family(self, model_id: str) -> Family | None:
        """The model as code and configuration, wherever its weights are; None until it was built."""
        return self.model(model_id).family

    def version(self, network: object) -> int:
        """The version of the weights of a leased part; another number once they came from files that had changed."""
        with self.lock:
            return next((one.version for one in self.store.components.values() if one.value is network), 0)

    def fits(self, model_id: str) -> bool:
        """Whether all parts of a built model can be on the device together."""
        return self.size(model_id) <= self.store.budget

    def size(self, model_id: str) -> int:
        """Bytes of the weights of all parts; 0 until the model was built."""
        return self.model(model_id).bytes

    def failure(self, model_id: str) -> LoadError | None:
        """Why the last load failed; None when it did not or is being tried again."""
        return self.model(model_id).error

    def poll(self) -> list[Change]:
        """The changes since the last call, in order. Raises the error that ended the loader: a device that is lost."""
        with self.lock:
            if self.broken:
                raise self.broken
            changes, self.changes = self.changes, []
        return changes

    def next(self) -> Task | None:
        """The loader's next task; None when there is nothing to do, or what must stay stands in the way."""
        builds = (Task("build", model_id) for model_id in self._loads if self.models[model_id].family is None)
        return self._next_drop() or next(builds, None) or self._next_bring()

    def end_load(self, model_id: str) -> None:
        """The load of this model has ended, well or badly."""
        self._loads = [other for other in self._loads if other != model_id]

    def change(self, model_id: str, state: State, detail: str = "", seconds: float = 0.0) -> None:
        """Set and report the state of a model."""
        model = self.models[model_id]
        model.state, model.since = state, self._clock()
        self.changes.append(ModelState(model_id, state, detail, seconds, model.on_device))

    def moved(self, left: Iterable[tuple[Component, Place]]) -> None:
        """Report what left the device and where it went, the models that became absent, and the memory now in use."""
        for one, place in left:
            for model_id in sorted(one.owners):
                model = self.models[model_id]
                self.changes.append(Evicted(model_id, one.part.name, "host" if place == "host" else "away", one.bytes))
                if model.state == "ready" and not model.on_device:
                    self.change(model_id, "absent", detail="evicted")
        store = self.store
        held = {"weights": store.used, "parked": store.parked, "budget": store.budget}
        self.changes.append(Memory(self._device, held))

    def _next_drop(self) -> Task | None:
        gone = self._dropped | {model_id for model_id, model in self.models.items() if model.state == "absent"}
        for model_id in list(self._dropped):
            mine = [one for one in self.models[model_id].parts.values() if one.bytes and one.owners <= gone]
            idle = [one for one in mine if one.place in ("device", "host") and not one.leases]
            if idle:
                self.store.claim((), idle)
                return Task("drop", leaving=idle)
            if all(one.place == "away" for one in mine):
                self._dropped.discard(model_id)
                if self.models[model_id].state == "ready":  # what it shares with others stays
                    self.change(model_id, "absent", detail="unloaded")
        return None

    def _next_bring(self) -> Task | None:
        """The first need that is not met, strictly in order: a later one would take the room that it waits for.

        Loads that no row waits for come last. Once a need is met nothing moves until the next `need`, and later needs
        spare what meets it: the rows that waited must be able to lease what came before it is taken away again.
        """
        if not self._fresh:
            return None
        met: set[int] = set()
        for model_id, phases, kept in self._needs:
            model = self.models[model_id]
            if model.state == "failed" or model.family is None:
                continue
            phases = phases if model.brought.issuperset(PHASES) else model.first(self.store.budget)
            if model.has(phases):
                met.update(id(one) for one in model.components(phases))
                continue
            task = self._plan(model_id, phases, kept, met)
            self._fresh = self.blocked = task is None
            return task
        self.blocked = False
        loads = (self._plan(id_, self.models[id_].first(self.store.budget), self._kept, met) for id_ in self._loads)
        return next(loads, None)

    def _plan(
        self, model_id: str, phases: tuple[Phase, ...], kept: frozenset[str], met: Collection[int]
    ) -> Task | None:
        model, spared = self.models[model_id], kept - {model_id}
        wanted = model.components(phases)
        leaving = self.store.room_for(wanted, lambda one: id(one) in met or not spared.isdisjoint(one.owners))
        if leaving is None:
            return None
        if model.state == "absent":
            model.spent = 0.0
            self.change(model_id, "loading")
        self.store.claim(wanted, leaving)
        return Task("bring", model_id, phases, wanted, leaving)
