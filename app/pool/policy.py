"""Policy: what the loader does next. Plain Python, without tensors, threads or locks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from app.errors import LoadError
from app.report import Phase, State

if TYPE_CHECKING:
    from app.families.base import Family
    from app.pool.memory import Component

PHASES: tuple[Phase, ...] = ("decode", "encode", "denoise")
"""The order of a first load: the VAE first, because the map of previews is fitted with it."""

Parts = tuple[str, tuple[Phase, ...]]
"""A model, and the phases whose components rows wait for."""


class Task(NamedTuple):
    """The next task of the loader; its components are claimed.

    build: find the parts of a model and check their headers. bring: move `leaving` off the device, and what is missing
    of `wanted` in. drop: free `leaving`; without any, all that is to leave has left.
    """

    kind: Literal["build", "bring", "drop"]
    model: str
    phases: tuple[Phase, ...] = ()
    wanted: Sequence[Component] = ()
    leaving: Sequence[Component] = ()


@dataclass
class Model:
    """The state of a model. brought: the phases whose components were on the device since it was built.

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
        return sum(one.bytes for one in self.parts.values() if here(one))

    def components(self, phases: Collection[Phase] = PHASES) -> list[Component]:
        """The components with weights that these phases need; none before the model is built."""
        names = [name for phase in PHASES if phase in phases and self.family for name in self.family.phases[phase]]
        return [self.parts[name] for name in names if name in self.parts]

    def has(self, phases: Collection[Phase]) -> bool:
        """Whether the model is ready and all components of these phases are on the device."""
        return self.state == "ready" and all(here(one) for one in self.components(phases))


class Policy:
    """Which components there are, what is wanted of the models, and what the loader does about it.

    The pool calls it under its lock. budget, host: bytes that weights may take of the device, and put aside in host
    memory. loads: models to load for a first time, or again. dropped: models to unload. needs: what rows wait for, in
    order, and the models whose components stay meanwhile. kept: the same models, for loads. fresh: no need was acted on
    since the last call of `Pool.need`. blocked: the first need that is not met waits for something that is leased or
    kept.
    """

    def __init__(self, models: dict[str, Model], budget: int, host: int) -> None:
        self.models, self.budget, self.host = models, budget, host
        self.components: list[Component] = []
        self.loads: list[str] = []
        self.dropped: set[str] = set()
        self.needs: list[tuple[str, tuple[Phase, ...], frozenset[str]]] = []
        self.kept = frozenset[str]()
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

    def forget(self) -> None:
        """Remove the components without owners. One that is still leased counts on, but no new load finds it."""
        self.components = [one for one in self.components if one.owners or one.leases]
        for one in self.components:
            one.key = one.key if one.owners else None

    def _drop(self) -> Task | None:
        """Free what no other model uses; a last task, without components, tells that nothing more is to be freed."""
        gone = self.dropped | {model_id for model_id, model in self.models.items() if model.state == "absent"}
        for model_id in list(self.dropped):
            mine = [one for one in self.models[model_id].parts.values() if one.bytes and one.owners <= gone]
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
        for model_id, phases, kept in self.needs:
            model = self.models[model_id]
            if model.state == "failed" or model.family is None:
                continue
            phases = phases if model.brought.issuperset(PHASES) else self._first(model)
            if model.has(phases):
                met.update(id(one) for one in model.components(phases))
                continue
            task = self._plan(model_id, phases, kept, met)
            self.fresh = self.blocked = task is None
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
        self, model_id: str, phases: tuple[Phase, ...], kept: frozenset[str], met: Collection[int]
    ) -> Task | None:
        wanted, spared = self.models[model_id].components(phases), kept - {model_id}
        leaving = self.room_for(wanted, lambda one: id(one) in met or not spared.isdisjoint(one.owners))
        if leaving is None:
            return None
        claim([*(one for one in wanted if one.place != "device"), *leaving])
        return Task("bring", model_id, phases, wanted, leaving)


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
