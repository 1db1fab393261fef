"""Memory: the parts of models, the place of their weights, and which of them leave so that others fit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

import torch

from app.cards.folder import Part
from app.checkpoints.parts import blank_part, part_stamp, part_states
from app.families.components import fill_network, has_weights

Place = Literal["device", "host", "away"]


class Component:
    """A network or a tokenizer, built once. Models may keep the object, which never changes; only its weights move.

    bytes: of its weights in `dtype`, from the headers of its files. leases: how many forbid it to move.
    used: when it was last leased. owners: ids of the models that have this part. moving: it is leaving its place.
    version: how often its weights were read from files that had changed since the last time.
    """

    def __init__(self, part: Part, device: torch.device, dtype: torch.dtype, key: Hashable = None) -> None:
        """Build it without weights, from headers and configs alone. Raises CheckpointError.

        key: what two models must have in common to share the part.
        """
        self.part, self.device, self.dtype, self.key = part, device, dtype, key
        self.leases = self.bytes = self.version = 0
        self.used = 0.0
        self.owners: set[str] = set()
        self.place: Place = "device"  # a tokenizer is always there
        self.moving = False
        self._stamp: tuple[Hashable, ...] = ()
        self.value = blank_part(part)
        if has_weights(part.class_name):
            # The sizes in the headers, each tensor once: the network accepts no other names or shapes.
            self.bytes = sum(tensor.numel() for tensor in _tensors(self.value)) * dtype.itemsize
            self.place = "away"

    @property
    def here(self) -> bool:
        """Whether it is on the device, and stays for now."""
        return self.place == "device" and not self.moving

    def arrive(self) -> None:
        """Bring the weights to the device, from host memory or from the files. Raises CheckpointError."""
        if self.place == "host":
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
    """All components. budget, host: bytes that weights may take of the device, and parked in host memory.

    Choices are made under `lock`, moves happen outside of it: a component that moves cannot be leased.
    """

    def __init__(self, budget: int, host: int) -> None:
        self.budget, self.host = budget, host
        self.lock = threading.Condition()
        self.components: list[Component] = []

    @property
    def used(self) -> int:
        """Bytes on the device, with those that are leaving it."""
        return sum(one.bytes for one in self.components if one.place == "device")

    @property
    def parked(self) -> int:
        """Bytes in host memory, with those on their way from there to the device."""
        return sum(one.bytes for one in self.components if one.place == "host")

    def room_for(self, wanted: Sequence[Component], kept: Callable[[Component], bool]) -> list[Component] | None:
        """Components that must leave the device so that all of `wanted` fit, longest unused first; None when what is
        leased or `kept` stands in the way."""
        missing = sum(one.bytes for one in wanted if one.place != "device")
        idle = (one for one in self.components if one.here and not one.leases and one.bytes)
        able = (one for one in idle if one not in wanted and not kept(one))
        return _longest_unused(able, self.used + missing - self.budget)

    def claim(self, components: Iterable[Component]) -> None:
        """Mark these as moving, so that nobody leases them. Under the lock."""
        for one in components:
            one.moving = True

    def bring(self, wanted: Sequence[Component], leaving: Sequence[Component]) -> None:
        """Move claimed components out and in, on the loader's thread.

        Raises what loading raises; what did not arrive is then away.
        """
        try:
            for one in leaving:
                self.put_aside(one)
            for one in wanted:
                if one.moving:
                    one.arrive()
                    self._end(one, "device")
        finally:
            self.settle((*leaving, *wanted))

    def settle(self, claimed: Iterable[Component]) -> None:
        """Free what is still on its way, after an error."""
        for one in claimed:
            if one.moving:
                self.drop(one)

    def put_aside(self, one: Component) -> None:
        """Move a claimed component off the device: to host memory when it fits there, else away."""
        with self.lock:
            parked = (other for other in self.components if other.place == "host" and not other.moving)
            parting = _longest_unused(parked, self.parked + one.bytes - self.host)
            self.claim(parting or ())
        for other in parting or ():
            self.drop(other)
        if parting is not None and one.park():
            self._end(one, "host")
        else:
            self.drop(one)

    def drop(self, one: Component) -> None:
        """Free a claimed component, wherever it was."""
        one.leave()
        self._end(one, "away")

    def _end(self, one: Component, place: Place) -> None:
        with self.lock:
            one.place, one.moving = place, False

    def forget(self) -> None:
        """Remove the components without owners. One that is still leased counts on until then."""
        self.components = [one for one in self.components if one.owners or one.leases]


def _longest_unused(components: Iterable[Component], excess: int) -> list[Component] | None:
    """As few components as free `excess` bytes, longest unused first; None when all together do not."""
    leaving: list[Component] = []
    for one in sorted(components, key=lambda one: one.used):
        if excess <= 0:
            break
        leaving.append(one)
        excess -= one.bytes
    return leaving if excess <= 0 else None
