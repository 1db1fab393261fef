"""Memory: the parts of models, and the moves of their weights between files, host memory and the device."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
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
