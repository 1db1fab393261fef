"""Books: what is wanted of the pool, how each model stands, and what is to be done next.

Knows nothing of threads and moves nothing: everything here is decided at once, under one lock that the caller holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from app.errors import LoadError, ModelNotFound
from app.families.base import Family
from app.pool.component import Component, Place
from app.pool.need import Need
from app.pool.store import Store
from app.report import Evicted, Memory, ModelState, Phase, State

RETRY_AFTER = 30.0
"""Seconds that a failed load stands before it is tried again."""

PHASES: tuple[Phase, ...] = ("decode", "encode", "denoise")
"""The order of a first load: the VAE first, because the map of previews is made of it."""

Change = ModelState | Evicted | Memory


@dataclass(frozen=True, slots=True)
class Build:
    """To do: find the parts of a model and check their headers."""

    model: str


@dataclass(frozen=True, slots=True)
class Bring:
    """To do: move `leaving` off the device, and what is missing of `wanted` in. Both are claimed."""

    model: str
    phases: tuple[Phase, ...]
    wanted: list[Component]
    leaving: list[Component]


@dataclass(frozen=True, slots=True)
class Drop:
    """To do: empty these components, which are claimed."""

    leaving: list[Component]


Job = Build | Bring | Drop


@dataclass
class Model:
    """How a model stands. brought: the phases whose parts were on the device since it was built.

    spent: seconds of the loader's time that the load took so far, without those in which it waited for room.
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
        """The parts with weights that these phases need; none while it is not built."""
        names = [name for phase in PHASES if phase in phases and self.family for name in self.family.phases[phase]]
        return [self.parts[name] for name in names if name in self.parts]

    def first(self, budget: int) -> tuple[Phase, ...]:
        """The phases that a load brings next: all, or one after the other when they do not fit together."""
        if self.bytes <= budget:
            return PHASES
        return next(((phase,) for phase in PHASES if phase not in self.brought), ("denoise",))


class Books:
    """The models, what is wanted, and what changed. `wake` is the lock, and is notified when there may be work.

    blocked: the first need that is not met waits for what is leased or kept. broken: what ended the loader, if it did.
    """

    def __init__(
        self, models: Collection[str], device: str, budget: int, host: int, clock: Callable[[], float]
    ) -> None:
        self.wake = threading.Condition()
        self.models = {model_id: Model() for model_id in models}
        self.store = Store(budget, host, self.wake)
        self.changes: list[Change] = []
        self.closed = self.blocked = False
        self.broken: BaseException | None = None
        self._device, self._clock = device, clock
        self._loads: list[str] = []
        self._dropped: set[str] = set()
        self._needs: Sequence[Need] = ()
        self._kept: Collection[str] = ()
        self._fresh = True

    def model(self, model_id: str) -> Model:
        """Raises ModelNotFound."""
        try:
            return self.models[model_id]
        except KeyError:
            raise ModelNotFound(f'no model "{model_id}"', param="model") from None

    def want(self, model_id: str) -> None:
        """Begin to load, if absent or failed long enough ago; a model that has lost parts of it gets them back."""
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
        self.wake.notify()

    def unload(self, model_id: str) -> None:
        """Let go of the model as soon as nobody leases it."""
        if self.model(model_id).state == "loading":
            self.loaded(model_id)
            self.change(model_id, "absent")
        self._dropped.add(model_id)
        self._needs = ()  # rows that wait for it say so again
        self.wake.notify()

    def need(self, needs: Sequence[Need], kept: Collection[str]) -> None:
        """What rows wait for now replaces what they waited for before."""
        if self._fresh and list(needs) == list(self._needs) and set(kept) == set(self._kept):
            return
        self._needs, self._kept, self._fresh = needs, kept, True
        for need in needs:
            self._dropped.discard(need.model)
            if self.model(need.model).state == "absent":
                self.want(need.model)
        self.wake.notify()

    def next(self) -> Job | None:
        """What the loader does next; None when there is nothing, or what must stay stands in the way."""
        return self._drop() or self._build() or self._bring()

    def loaded(self, model_id: str) -> None:
        """The load of this model is over, well or badly."""
        self._loads = [other for other in self._loads if other != model_id]

    def change(self, model_id: str, state: State, detail: str = "", seconds: float = 0.0) -> None:
        """Write down how a model stands from now on."""
        model = self.models[model_id]
        model.state, model.since = state, self._clock()
        self.changes.append(ModelState(model_id, state, detail, seconds, model.on_device))

    def tell(self, left: Sequence[tuple[Component, Place]]) -> None:
        """What left the device, which models are absent by it, and what memory holds now."""
        for one, place in left:
            for model_id in sorted(one.owners):
                model = self.models[model_id]
                self.changes.append(Evicted(model_id, one.part.name, "host" if place == "host" else "away", one.bytes))
                if model.state == "ready" and not model.on_device:
                    self.change(model_id, "absent", detail="evicted")
        store = self.store
        held = {"weights": store.used, "parked": store.parked, "budget": store.budget}
        self.changes.append(Memory(self._device, held))

    def _drop(self) -> Drop | None:
        gone = self._dropped | {model_id for model_id, model in self.models.items() if model.state == "absent"}
        for model_id in list(self._dropped):
            mine = [one for one in self.models[model_id].parts.values() if one.bytes and one.owners <= gone]
            idle = [one for one in mine if one.place in ("device", "host") and not one.leases]
            if idle:
                self.store.claim((), idle)
                return Drop(idle)
            if all(one.place == "away" for one in mine):
                self._dropped.discard(model_id)
                if self.models[model_id].state == "ready":  # what it shares with others stays
                    self.change(model_id, "absent", detail="unloaded")
        return None

    def _build(self) -> Build | None:
        return next((Build(model_id) for model_id in self._loads if self.models[model_id].family is None), None)

    def _bring(self) -> Bring | None:
        """The first need that is not met, strictly in order: a later one would take the room that it waits for.

        Loads that no row waits for come last. After a need is met nothing moves until the next `need`, and what meets
        one is spared by those after it: whoever waited must be able to lease what came before it is taken away again.
        """
        if not self._fresh:
            return None
        met: set[int] = set()
        for need in self._needs:
            model = self.models[need.model]
            if model.state == "failed" or model.family is None:
                continue
            phases = need.phases if model.brought.issuperset(PHASES) else model.first(self.store.budget)
            if model.state == "ready" and all(one.place == "device" for one in model.components(phases)):
                met.update(id(one) for one in model.components(phases))
                continue
            job = self._plan(need.model, phases, () if need.urgent else self._kept, met)
            self._fresh = self.blocked = job is None
            return job
        self.blocked = False
        loads = (self._plan(id_, self.models[id_].first(self.store.budget), self._kept, met) for id_ in self._loads)
        return next(loads, None)

    def _plan(
        self, model_id: str, phases: tuple[Phase, ...], kept: Collection[str], met: Collection[int]
    ) -> Bring | None:
        model, spared = self.models[model_id], set(kept) - {model_id}
        wanted = model.components(phases)
        leaving = self.store.room_for(wanted, lambda one: id(one) in met or not spared.isdisjoint(one.owners))
        if leaving is None:
            return None
        if model.state == "absent":
            model.spent = 0.0
            self.change(model_id, "loading")
        self.store.claim(wanted, leaving)
        return Bring(model_id, phases, wanted, leaving)
