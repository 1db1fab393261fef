"""Component: one part of a model, built once, whose weights come and go: on the device, in host memory, or away.

Knows nothing of models, budgets or of when to move: the pool decides, and moves only what nobody leases.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any, Literal

import torch

from app.cards.folder import Part
from app.checkpoints.parts import part_outline, part_stamp, part_states
from app.families.components import blank_network, build_tokenizer, empty_network, fill_network, has_weights

Place = Literal["device", "host", "away", "moving"]
Key = tuple[tuple[Hashable, ...], torch.dtype, tuple[float | None, ...]]
"""What two models must have in common to share a part: its identity, number format, what the card changes of it."""


class Component:
    """A network or a tokenizer. The object never changes, so models may hold it; only its weights move.

    bytes: of its weights in `dtype`, from the headers of its files. leases: how many hold it where it is.
    used: when it was last leased. owners: ids of the models that it is part of. origin: where a moving one was.
    arrived: it has come to the device, which is not written down yet. version: how often its weights were read from
    files that had changed since the time before.
    """

    def __init__(self, part: Part, device: torch.device, dtype: torch.dtype) -> None:
        """Builds it without weights: nothing but headers and configs are read. Raises CheckpointError."""
        self.part, self.device, self.dtype = part, device, dtype
        self.leases = 0
        self.used = 0.0
        self.owners: set[str] = set()
        self.bytes = 0
        self.place: Place = "device"  # a tokenizer is always there
        self.origin: Place = "away"
        self.arrived = False
        self.version = 0
        self._stamp: tuple[Hashable, ...] = ()
        if not has_weights(part.class_name):
            self.value: Any = build_tokenizer(part.class_name, part.folder)
            return
        self.value = blank_network(part.class_name, part.folder, part_outline(part), part.file)
        # What the headers say, each tensor once: the network accepts no other names or shapes.
        own = {id(tensor): tensor for tensor in (*self.value.parameters(), *self.value.buffers())}
        self.bytes = sum(tensor.numel() for tensor in own.values()) * dtype.itemsize
        self.place = "away"

    def arrive(self) -> None:
        """To the device, from host memory or from the files. Raises CheckpointError; the weights are then away."""
        if self.origin == "host":
            _move(self.value, self.device)
        else:
            stamp, states = part_stamp(self.part), part_states(self.part)
            fill_network(self.value, self.part.class_name, self.part.weights, states, self.device, self.dtype)
            after = part_stamp(self.part)  # files that changed while they were read count as others
            self.version, self._stamp = self.version + (not stamp == after == self._stamp), after
        self.arrived, self.used = True, time.monotonic()

    def settle(self) -> None:
        """Where it is after a move; one that did not come to its end leaves nothing behind."""
        if self.place == "moving" and not self.arrived:
            self.leave()
        if self.place == "moving":
            self.place = "device" if self.arrived else "away"
        self.origin, self.arrived = self.place, False

    def park(self) -> bool:
        """From the device to host memory, pinned where there is a GPU to copy back to; False where there is no room."""
        try:
            _move(self.value, torch.device("cpu"), pin=self.device.type == "cuda")
        except (RuntimeError, MemoryError):
            return False
        return True

    def leave(self) -> None:
        """Away: the memory is free, the files are what is left."""
        empty_network(self.value)


@torch.no_grad()
def _move(network: torch.nn.Module, device: torch.device, pin: bool = False) -> None:
    """Parameters and buffers to a device, one by one: what was moved is free before the next."""
    for tensor in {id(t): t for t in (*network.parameters(), *network.buffers())}.values():
        moved = tensor.data.to(device)
        tensor.data = moved.pin_memory() if pin else moved
