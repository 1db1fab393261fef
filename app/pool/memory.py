"""Memory: parts of models whose weights come and go, where each of them is, and which leave so that others fit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

import torch

from app.cards.folder import Part
from app.checkpoints.parts import blank_part, part_stamp, part_states
from app.families.components import fill_network, has_weights

Place = Literal["device", "host", "away", "moving"]
Key = tuple[tuple[Hashable, ...], torch.dtype, tuple[float | None, ...]]
"""What two models must have in common to share a part: its identity, number format, and what the card changes of it."""


class Component:
    """A network or a tokenizer, built once. Models may hold the object, which never changes; only its weights move.

    bytes: of its weights in `dtype`, from the headers of its files. leases: how many forbid it to move.
    used: when it was last leased. owners: ids of the models that have this part. origin: where a moving one was.
    version: how often its weights were read from files that had changed since the last time.
    """

    def __init__(self, part: Part, device: torch.device, dtype: torch.dtype) -> None:
        """Build it without weights, from headers and configs alone. Raises CheckpointError."""
        self.part, self.device, self.dtype = part, device, dtype
        self.leases = self.bytes = self.version = 0
        self.used = 0.0
        self.owners: set[str] = set()
        self.place: Place = "device"  # a tokenizer is always there
        self.origin: Place = "away"
        self._stamp: tuple[Hashable, ...] = ()
        self.value = blank_part(part)
        if has_weights(part.class_name):
            # The sizes in the headers, each tensor once: the network accepts no other names or shapes.
            self.bytes = sum(tensor.numel() for tensor in _tensors(self.value)) * dtype.itemsize
            self.place = "away"

    def arrive(self) -> None:
        """Bring the weights to the device, from host memory or from the files. Raises CheckpointError."""
        if self.origin == "host":
            _move(self.value, self.device)
        else:
            stamp, states = part_stamp(self.part), part_states(self.part)
            fill_network(self.value, self.part.weights, states, self.device, self.dtype)
            after = part_stamp(self.part)  # files that changed while they were read count as others
            self.version, self._stamp = self.version + (not stamp == after == self._stamp), after
        self.used = time.monotonic()

    def park(self) -> bool:
        """Move the weights to host memory, pinned where there is a GPU; False where there is no room."""
        try:
            _move(self.value, torch.device("cpu"), pin=self.device.type == "cuda")
        except (RuntimeError, MemoryError):
            return False
        return True

    def leave(self) -> None:
        """Free the weights; their files remain."""
        self.value.to("meta")


def _tensors(network: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Parameters and buffers, each once."""
    return {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}.values()


@torch.no_grad()
def _move(network: torch.nn.Module, device: torch.device, pin: bool = False) -> None:
    """Move tensors to a device one by one, so that each is free before the next."""
    for tensor in _tensors(network):
        moved = tensor.data.to(device)
        tensor.data = moved.pin_memory() if pin else moved


class Store:
    """All components by their keys. budget, host: bytes of weights on the device, and parked in host memory.

    Choices are made under `lock`, moves happen outside of it: a component on its way is "moving", and cannot be leased.
    """

    def __init__(self, budget: int, host: int) -> None:
        self.budget, self.host = budget, host
        self.lock = threading.Condition()
        self.components: dict[Key, Component] = {}

    @property
    def used(self) -> int:
        """Bytes on the device or on their way to or from it."""
        return sum(one.bytes for one in self.components.values() if one.place in ("device", "moving"))

    @property
    def parked(self) -> int:
        """Bytes in host memory, with those on their way from there to the device."""
        return sum(one.bytes for one in self.components.values() if "host" in (one.place, one.origin))

    def room_for(self, wanted: Sequence[Component], kept: Callable[[Component], bool]) -> list[Component] | None:
        """Components that must leave the device so that all of `wanted` fit, longest unused first; None when what is
        leased or `kept` stands in the way."""
        missing = sum(one.bytes for one in wanted if one.place != "device")
        idle = (one for one in self.components.values() if one.place == "device" and not one.leases and one.bytes)
        able = (one for one in idle if one not in wanted and not kept(one))
        return _longest_unused(able, self.used + missing - self.budget)

    def claim(self, wanted: Iterable[Component], leaving: Iterable[Component]) -> None:
        """Mark these as moving, so that nobody leases them. Under the lock."""
        for one in (*(one for one in wanted if one.place != "device"), *leaving):
            one.origin, one.place = one.place, "moving"

    def bring(self, wanted: Sequence[Component], leaving: Sequence[Component]) -> list[tuple[Component, Place]]:
        """Move claimed components out and in, on the loader's thread. Returns what left the device, and where to.

        Raises what loading raises; what did not arrive is then away.
        """
        coming = [one for one in wanted if one.place == "moving"]
        arrived: list[Component] = []
        try:
            left = [(one, self.put_aside(one)) for one in leaving]
            for one in coming:
                one.arrive()
                arrived.append(one)
        finally:
            with self.lock:
                for one in arrived:
                    one.place = one.origin = "device"
            self.settle((*leaving, *coming))
        return left

    def settle(self, claimed: Iterable[Component]) -> None:
        """Free what is still on its way, after an error."""
        for one in claimed:
            if one.place == "moving":
                self.drop(one)

    def put_aside(self, one: Component) -> Place:
        """Move a claimed component off the device: to host memory when it fits there, else away."""
        with self.lock:
            parked = (other for other in self.components.values() if other.place == "host")
            parting = _longest_unused(parked, self.parked + one.bytes - self.host)
            self.claim((), parting or ())
        for other in parting or ():
            self.drop(other)
        if parting is None or not one.park():
            self.drop(one)
            return "away"
        with self.lock:
            one.place = one.origin = "host"
        return "host"

    def drop(self, one: Component) -> None:
        """Free a claimed component, wherever it was."""
        one.leave()
        with self.lock:
            one.place = one.origin = "away"

    def forget(self) -> None:
        """Remove the components without owners. One that is still leased counts on, but no new load finds it."""
        kept: dict[Key, Component] = {}
        for (identity, dtype, traits), one in self.components.items():
            if one.owners:
                kept[identity, dtype, traits] = one
            elif one.leases:
                kept[(*identity, id(one)), dtype, traits] = one
        self.components = kept


def _longest_unused(components: Iterable[Component], excess: int) -> list[Component] | None:
    """As few as free `excess` bytes, longest unused first; None when all together do not."""
    leaving: list[Component] = []
    for one in sorted(components, key=lambda one: one.used):
        if excess <= 0:
            break
        leaving.append(one)
        excess -= one.bytes
    return leaving if excess <= 0 else None
