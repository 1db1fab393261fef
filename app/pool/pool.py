"""Pool: the models on one device. It brings weights in the background, leases them, and makes room.

Components (a network, a VAE, a text encoder) are what moves and what is leased; models that name the same one share it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping

import torch

from app.cards.card import Card
from app.errors import LoadError
from app.families.base import Family
from app.pool.loader import Loader
from app.pool.memory import Component, Store
from app.pool.policy import Policy
from app.report import Phase


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


class Pool(Policy):
    """The models of these cards on one device. Every method here is thread-safe and returns at once.

    What is leased never moves. Of the rest, what was leased longest ago leaves first: to host memory beside a GPU,
    where it may take `host` bytes, and then away.
    """

    def __init__(
        self,
        cards: Mapping[str, Card],
        device: str,
        dtype: torch.dtype,
        *,
        budget: int = sys.maxsize,
        host: int = 0,
        compiled: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """dtype: of the networks; a VAE on the CPU is float32 always. budget: bytes that weights may take of the
        device. compiled: networks compile their blocks. clock: seconds, for the wait after a failure."""
        self.cards, self.device, self.dtype = dict(cards), torch.device(device), dtype
        # On a CPU the host's memory is the device's: there is nowhere to put weights aside.
        super().__init__(cards, device, Store(budget, host if self.device.type != "cpu" else 0), clock)
        self._loader = Loader(self, self.cards, self.device, dtype, compiled)

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

    def close(self) -> None:
        """Take no more loads, and wait a little for the running one."""
        with self.lock:
            self.closed = True
            self.lock.notify()
        self._loader.join(5)
