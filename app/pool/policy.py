"""Policy: what the loader does next. Plain Python, without tensors, threads or locks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import ByteSize

from app.errors import LoadError
from app.report import Phase, State

if TYPE_CHECKING:
    from app.families.base import Family
    from app.pool.memory import AdapterComponent, Component

PHASES: tuple[Phase, ...] = ("decode", "encode", "denoise")
"""The order of a first load: the VAE first, because the map of previews is fitted with it."""

Kept = str | tuple[str, str]
"""A model whose components stay, or one of its adapters: (model, name)."""

ADAPTED: tuple[Phase, ...] = ("encode", "denoise")
"""The phases that compute with adapters."""


Parts = tuple[str, tuple[Phase, ...], tuple[str, ...]]
"""What rows wait for: a model, the phases whose components they need, and the names of their adapters."""


class Task(NamedTuple):
    """The next task of the loader; its components are claimed.

    build: find the parts of a model and check their headers. bring: move `leaving` off the device, and what is missing
    of `wanted` in. drop: free `leaving`; without any, all that is to leave has left. adapter: the one of the model that
    is built or brought, instead of its parts.
    """

    kind: Literal["build", "bring", "drop"]
    model: str
    phases: tuple[Phase, ...] = ()
    wanted: Sequence[Component] = ()
    leaving: Sequence[Component] = ()
    adapter: str = ""


@dataclass
class Model:
    """The state of a model. brought: the phases whose components were on the device since it was built.

    spent: the loader's seconds on this load so far, without those in which it waited for room. adapters: those that
    rows have asked for. faults: why adapters cannot be used, and since when.
    """

    state: State = "absent"
    family: Family | None = None
    parts: dict[str, Component] = field(default_factory=dict)
    adapters: dict[str, AdapterComponent] = field(default_factory=dict)
    faults: dict[str, tuple[LoadError, float]] = field(default_factory=dict)
    brought: set[Phase] = field(default_factory=set)
    error: LoadError | None = None
    since: float = 0.0
    spent: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.parts.values())

    @property
    def on_device(self) -> int:
        return sum(one.bytes for one in self.parts.values() if here(one))

    @property
    def all(self) -> list[Component]:
        """Its parts and its adapters."""
        return [*self.parts.values(), *self.adapters.values()]

    def components(self, phases: Collection[Phase] = PHASES, adapters: Collection[str] = ()) -> list[Component]:
        """The components with weights that these phases need; none before the model is built, and only adapters that
        are built."""
        names = [name for phase in PHASES if phase in phases and self.family for name in self.family.phases[phase]]
        used = adapters if not set(ADAPTED).isdisjoint(phases) else ()
        parts = [self.parts[name] for name in names if name in self.parts]
        return parts + [self.adapters[name] for name in used if name in self.adapters]

    def has(self, phases: Collection[Phase], adapters: Collection[str] = ()) -> bool:
        """Whether the model is ready and all components of these phases are on the device."""
        if self.state != "ready" or not all(here(one) for one in self.components(phases, adapters)):
            return False
        return set(ADAPTED).isdisjoint(phases) or self.adapters.keys() >= set(adapters)


class Policy:
    """Which components there are, what is wanted of the models, and what the loader does about it.

    The pool calls it under its lock. budget, host: bytes that weights may take of the device, and put aside in host
    memory. loads: models to load for a first time, or again. dropped: models to unload. needs: what rows wait for, in
    order, and the models and adapters that stay meanwhile. kept: the same ones, for loads. fresh: no need was acted on
    since the last call of `Pool.need`. blocked: the first need that is not met waits for something that is leased or
    kept.
    """

    def __init__(self, models: dict[str, Model], budget: int, host: int) -> None:
        self.models, self.budget, self.host = models, budget, host
        self.components: list[Component] = []
        self.loads: list[str] = []
        self.dropped: set[str] = set()
        self.needs: list[tuple[Parts, frozenset[Kept]]] = []
        self.kept = frozenset[Kept]()
        self.fresh = True
        self.blocked = False

    @property
    def used(self) -> int:
        """Bytes on the device, with those that are leaving it."""
        return sum(one.bytes for one in self.components if one.place == "device")

    @property
    def parked(self) -> int:
        """Bytes in host memory, with those on their way from there to the device."""
        return sum(one.bytes for one in self.components if one.place == "host")

    def next(self) -> Task | None:
        """The next task; None when there is nothing to do, or what must stay stands in the way."""
        builds = (Task("build", model_id) for model_id in self.loads if self.models[model_id].family is None)
        return self._drop() or next(builds, None) or self._bring()

    def loaded(self, model_id: str) -> None:
        """Forget a load that has ended, well or badly."""
        self.loads = [other for other in self.loads if other != model_id]

    def check_size(self, model_id: str, device: str, adapters: Collection[str] = ()) -> None:
        """Raises LoadError for a built model with a phase that needs more than the budget of the device."""
        model = self.models[model_id]
        sizes = {phase: sum(one.bytes for one in model.components((phase,), adapters)) for phase in PHASES}
        phase = max(PHASES, key=lambda phase: sizes[phase])
        if sizes[phase] > self.budget:
            needed, budget = (ByteSize(size).human_readable(True) for size in (sizes[phase], self.budget))
            beside = f" with {', '.join(adapters)}" if adapters else ""
            raise LoadError(
                f"{model_id}: what it needs to {phase}{beside} takes {needed}, and weights may take {budget} of "
                f"{device} (INSTEP_DEVICE_MEMORY)",
                code="insufficient_gpu_memory",
            )

    def fault(self, model_id: str, device: str, adapters: Collection[str]) -> LoadError | None:
        """Why these adapters of a model cannot be used: one is broken, or they do not fit beside it."""
        faults = self.models[model_id].faults
        for name in adapters:
            if name in faults:
                return faults[name][0]
        try:
            self.check_size(model_id, device, adapters)
        except LoadError as error:
            return error.again() if adapters else None
        return None

    def room_for(
        self, wanted: Sequence[Component], kept: Callable[[Component], bool] = lambda one: False
    ) -> list[Component] | None:
        """Components that must leave the device so that all of `wanted` fit, longest unused first; None when what is
        leased or `kept` stands in the way."""
        missing = sum(one.bytes for one in wanted if one.place != "device")
        idle = (one for one in self.components if here(one) and not one.leases and one.bytes)
        able = (one for one in idle if one not in wanted and not kept(one))
        return _longest_unused(able, self.used + missing - self.budget)

    def room_aside(self, one: Component) -> list[Component] | None:
        """Components that must leave host memory so that this one can be put aside there; None when it cannot."""
        parked = (other for other in self.components if other.place == "host" and not other.moving)
        return _longest_unused(parked, self.parked + one.bytes - self.host)

    def forget(self, model_id: str) -> None:
        """Take its components from a model, and remove those without owners. One that is still leased counts on, but no
        new load finds it."""
        model = self.models[model_id]
        for one in model.all:
            one.owners.discard(model_id)
        model.family, model.parts, model.brought, model.adapters, model.faults = None, {}, set(), {}, {}
        self.loaded(model_id)
        self.components = [one for one in self.components if one.owners or one.leases]
        for one in self.components:
            one.key = one.key if one.owners else None

    def _drop(self) -> Task | None:
        """Free what no other model uses; a last task, without components, tells that nothing more is to be freed."""
        gone = self.dropped | {model_id for model_id, model in self.models.items() if model.state == "absent"}
        for model_id in list(self.dropped):
            mine = [one for one in self.models[model_id].all if one.bytes and one.owners <= gone]
            idle = [one for one in mine if one.place != "away" and not one.leases]
            if all(one.place == "away" for one in mine):
                self.dropped.discard(model_id)
            elif not idle:
                continue
            claim(idle)
            return Task("drop", model_id, leaving=idle)
        return None

    def _bring(self) -> Task | None:
        """Meet the first need that is not met, strictly in order: a later one would take the room that it waits for.

        Loads that no row waits for come last. Once a need is met nothing moves until the next `Pool.need`, and later
        needs spare what meets it: the rows that waited must be able to lease what came before it is taken away again.
        """
        if not self.fresh:
            return None
        met: set[int] = set()
        for (model_id, phases, adapters), kept in self.needs:
            model = self.models[model_id]
            if model.state == "failed" or model.family is None or not model.faults.keys().isdisjoint(adapters):
                continue
            phases = phases if model.brought.issuperset(PHASES) else self._first(model)
            present = [one for one in model.components(phases, adapters) if here(one)]
            if model.has(phases, adapters):
                met.update(map(id, present))
                continue
            if not model.has(phases):
                task = self._plan(model_id, phases, kept, met)
            else:
                task = self._adapt(model_id, adapters, kept, met.union(map(id, present)))
            self.blocked = task is None
            self.fresh = task is None or task.kind == "build"
            return task
        self.blocked = False
        loads = (self._plan(model_id, self._first(self.models[model_id]), self.kept, met) for model_id in self.loads)
        return next(loads, None)

    def _first(self, model: Model) -> tuple[Phase, ...]:
        """The phases that a load brings next: all, or one after the other when they do not fit together."""
        if model.bytes <= self.budget:
            return PHASES
        return next(((phase,) for phase in PHASES if phase not in model.brought), ("denoise",))

    def _plan(
        self, model_id: str, phases: tuple[Phase, ...], kept: frozenset[Kept], met: Collection[int], adapter: str = ""
    ) -> Task | None:
        model, spared = self.models[model_id], kept - {model_id}
        wanted = [model.adapters[adapter]] if adapter else model.components(phases)
        leaving = self.room_for(wanted, lambda one: id(one) in met or not spared.isdisjoint(one.tags))
        if leaving is None:
            return None
        claim([*(one for one in wanted if one.place != "device"), *leaving])
        return Task("bring", model_id, phases, wanted, leaving, adapter)

    def _adapt(
        self, model_id: str, adapters: Sequence[str], kept: frozenset[Kept], met: Collection[int]
    ) -> Task | None:
        """Build or bring the first adapter that is not here."""
        model = self.models[model_id]
        name = next(name for name in adapters if name not in model.adapters or not here(model.adapters[name]))
        if name in model.adapters:
            return self._plan(model_id, (), kept, met, name)
        return Task("build", model_id, adapter=name)


def here(one: Component) -> bool:
    """Whether a component is on the device, and stays for now."""
    return one.place == "device" and not one.moving


def claim(components: Iterable[Component]) -> None:
    """Mark these as moving, so that nobody leases them."""
    for one in components:
        one.moving = True


def _longest_unused(components: Iterable[Component], excess: int) -> list[Component] | None:
    """As few components as free `excess` bytes, longest unused first; None when all together do not."""
    leaving: list[Component] = []
    for one in sorted(components, key=lambda one: one.used):
        if excess <= 0:
            break
        leaving.append(one)
        excess -= one.bytes
    return leaving if excess <= 0 else None
