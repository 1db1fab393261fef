"""Store: where each component's weights are, which must go so that others fit, and the moving, within two budgets.

Knows nothing of models or of who waits. Choices are made under the lock that it is given, moves outside of it: a
component on its way is "moving", and nobody leases such a one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from app.pool.component import Component, Key, Place


class Store:
    """All components by what they are. budget, host: bytes of weights on the device, and put aside in host memory."""

    def __init__(self, budget: int, host: int, lock: threading.Condition) -> None:
        self.budget, self.host = budget, host
        self.components: dict[Key, Component] = {}
        self._lock = lock

    @property
    def used(self) -> int:
        """Bytes on the device or on their way to or from it."""
        return sum(one.bytes for one in self.components.values() if one.place in ("device", "moving"))

    @property
    def parked(self) -> int:
        """Bytes put aside in host memory, those on their way from there to the device included."""
        return sum(one.bytes for one in self.components.values() if "host" in (one.place, one.origin))

    def room_for(self, wanted: Iterable[Component], kept: Callable[[Component], bool]) -> list[Component] | None:
        """What must leave the device so that all of `wanted` are there, longest unused first.

        None when what is leased, or `kept`, stands in the way.
        """
        wanted = list(wanted)
        missing = sum(one.bytes for one in wanted if one.place != "device")
        excess = self.used + missing - self.budget
        leaving: list[Component] = []
        for one in sorted(self._idle(), key=lambda one: one.used):
            if excess <= 0:
                break
            if one not in wanted and not kept(one):
                leaving.append(one)
                excess -= one.bytes
        return leaving if excess <= 0 else None

    def bring(self, wanted: Sequence[Component], leaving: Sequence[Component]) -> list[tuple[Component, Place]]:
        """Move `leaving` out and `wanted` in; on the loader's thread. Returns what left the device, and where to.

        The caller has chosen both under the lock, by `claim`. Raises what loading raises; what did not come is away.
        """
        coming = [one for one in wanted if one.place == "moving"]
        try:
            left = [(one, self.put_aside(one)) for one in leaving]
            for one in coming:
                one.arrive()
        finally:
            with self._lock:
                for one in (*leaving, *coming):
                    one.settle()
        return left

    def claim(self, wanted: Iterable[Component], leaving: Iterable[Component]) -> None:
        """From now on nobody leases these: they are about to move. Under the lock."""
        for one in (*(one for one in wanted if one.place != "device"), *leaving):
            one.origin, one.place = one.place, "moving"

    def put_aside(self, one: Component) -> Place:
        """A claimed component off the device: to host memory when it may be there, else away."""
        with self._lock:
            parting = self._parting(one)
            for other in parting or ():
                other.place = "moving"
        for other in parting or ():
            other.leave()
        place: Place = "away"
        if parting is not None and one.park():
            place = "host"
        else:
            one.leave()
        with self._lock:
            one.place = one.origin = place
            for other in parting or ():
                other.place = other.origin = "away"
        return place

    def forget(self) -> None:
        """Leave out the components that no model has any more. What is still leased counts on, under no one's name."""
        kept: dict[Key, Component] = {}
        for (identity, dtype, traits), one in self.components.items():
            if one.owners:
                kept[identity, dtype, traits] = one
            elif one.leases:
                kept[(*identity, id(one)), dtype, traits] = one
        self.components = kept

    def drop(self, one: Component) -> None:
        """A claimed component away, wherever it was."""
        one.leave()
        with self._lock:
            one.place = one.origin = "away"

    def _parting(self, one: Component) -> list[Component] | None:
        """What must leave host memory so that this fits there, longest unused first; None when it does not."""
        excess = self.parked + one.bytes - self.host
        leaving: list[Component] = []
        for other in sorted(self.components.values(), key=lambda other: other.used):
            if excess <= 0:
                break
            if other.place == "host":
                leaving.append(other)
                excess -= other.bytes
        return leaving if excess <= 0 else None

    def _idle(self) -> list[Component]:
        return [one for one in self.components.values() if one.place == "device" and not one.leases and one.bytes]
