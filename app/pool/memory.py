"""Memory: the parts of models, and the moves of their weights between files, host memory and the device."""

import logging
import time
from collections.abc import Hashable, Iterable, Mapping, Set
from typing import Any, Literal

import torch

from app.cards.adapters import Adapter
from app.cards.folder import Part
from app.checkpoints.adapters import read_adapter
from app.checkpoints.parts import blank_part, part_stamp, part_states
from app.checkpoints.tensors import State
from app.errors import LoadError
from app.families.adapters import LoRA, lay_out
from app.families.components import fill_network

_log = logging.getLogger(__name__)

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
        self.value = self._blank()
        if isinstance(self.value, torch.nn.Module):
            # The sizes in the headers, each tensor once: the network accepts no other names or shapes.
            self.bytes = sum(tensor.numel() for tensor in _tensors(self.value)) * dtype.itemsize
            self.place = "away"

    @property
    def tags(self) -> Set[object]:
        """What may ask for it to stay: its models."""
        return self.owners

    def arrive(self) -> None:
        """Bring the weights to the device, from host memory or from the files. Raises CheckpointError."""
        if self.place == "host":
            _move(self.value, self.device)
        else:
            stamp, states = part_stamp(self.part), self._states()
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

    def _blank(self) -> Any:
        return blank_part(self.part)

    def _states(self) -> Iterable[State]:
        return part_states(self.part)


class AdapterComponent(Component):
    """An adapter for the networks of one model."""

    def __init__(
        self, adapter: Adapter, networks: Mapping[str, torch.nn.Module], device: torch.device, dtype: torch.dtype
    ) -> None:
        """networks: by the names of their parts. Raises CheckpointError."""
        self.adapter, self._networks = adapter, networks
        super().__init__(Part("lora", "LoRA", adapter.file.parent, adapter.file), device, dtype)

    @property
    def tags(self) -> Set[object]:
        """Its model, and the model with the name of the adapter."""
        return {*self.owners, *((model, self.adapter.name) for model in self.owners)}

    def _blank(self) -> LoRA:
        return LoRA(read_adapter(self.adapter.file, self._networks).pairs, self._networks)

    def _states(self) -> Iterable[State]:
        yield lay_out(read_adapter(self.adapter.file, self._networks).pairs)[0]


def load_error(name: str, error: Exception, device: torch.device) -> LoadError:
    """A new error for users: the traceback of the caught one holds all that was loaded until it was raised.

    name: of the model or the adapter that cannot be used.
    """
    if isinstance(error, LoadError):
        return error.again()
    if isinstance(error, torch.OutOfMemoryError):
        return LoadError(f"{name}: not enough memory on {device}")
    _log.error("loading %s", name, exc_info=error)
    return LoadError(f"{name}: cannot be loaded ({type(error).__name__})")


def _tensors(network: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Parameters and buffers, each once."""
    return {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}.values()


@torch.no_grad()
def _move(network: torch.nn.Module, device: torch.device, pin: bool = False) -> None:
    """Move tensors to a device one by one, so that each is free before the next."""
    for tensor in _tensors(network):
        moved = tensor.data.to(device)
        tensor.data = moved.pin_memory() if pin else moved
