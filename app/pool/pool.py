"""Pool: which weights are on the device. It brings them in the background, leases them, and makes room.

Components (a network, a VAE, a text encoder) are what moves and what is leased; models that name the same one share it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from app.cards.card import Card
from app.errors import LoadError
from app.families.base import Family
from app.pool.loader import Loader
from app.pool.memory import Store
from app.pool.policy import Change, Need, Policy
from app.report import Phase


class Lease:
    """A hold on the parts of one phase of a model."""

    def __init__(self, model: Family, release: Callable[[], None]) -> None:
        self.model = model
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """End the hold; later calls do nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Pool:
    """The models of these cards on one device. Every method is thread-safe and returns at once.

    What is leased never moves. Of the rest, what was leased longest ago leaves first: to host memory beside a GPU,
    where it may take `host` bytes, and then away. A method that takes a model's id raises ModelNotFound.
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
        store = Store(budget, host if self.device.type != "cpu" else 0)
        self._lock = store.lock
        self._policy = Policy(self.cards, device, store, clock)
        self._loader = Loader(self._policy, self.cards, self.device, dtype, compiled)

    def want(self, model_id: str) -> None:
        """Start loading in the background if absent, or if the last load failed over 30 s ago."""
        with self._lock:
            self._policy.want(model_id)

    def unload(self, model_id: str) -> None:
        """Take the model off the device and out of host memory, once nobody leases it."""
        with self._lock:
            self._policy.unload(model_id)

    def need(self, needs: Sequence[Need], kept: Collection[str] = ()) -> None:
        """Replace what rows wait for, most urgent first.

        kept: models whose parts stay, except for urgent needs. Rows that waited must lease what came before the next
        call: until then nothing else moves.
        """
        with self._lock:
            self._policy.need(needs, kept)

    def lease(self, model_id: str, phase: Phase) -> Lease | None:
        """A hold on the parts of a phase, or None while they are not all on the device."""
        with self._lock:
            model = self._policy.model(model_id)
            if not model.has((phase,)):
                return None
            leased = model.components((phase,))
            for one in leased:
                one.leases += 1
                one.used = time.monotonic()

        def release() -> None:
            with self._lock:
                for one in leased:
                    one.leases -= 1
                self._lock.notify()

        assert model.family is not None
        return Lease(model.family, release)

    def resident(self, model_id: str, phase: Phase) -> bool:
        """Whether `lease` would succeed now."""
        with self._lock:
            return self._policy.model(model_id).has((phase,))

    def family(self, model_id: str) -> Family | None:
        """The model as code and configuration, wherever its weights are; None until it was built."""
        with self._lock:
            return self._policy.model(model_id).family

    def version(self, network: object) -> int:
        """The version of the weights of a leased part; another number once they came from files that had changed."""
        with self._lock:
            components = self._policy.store.components.values()
            return next((one.version for one in components if one.value is network), 0)

    def fits(self, model_id: str) -> bool:
        """Whether all parts of a built model can be on the device together."""
        with self._lock:
            return self._policy.model(model_id).bytes <= self._policy.store.budget

    def size(self, model_id: str) -> int:
        """Bytes of the weights of all parts; 0 until the model was built."""
        with self._lock:
            return self._policy.model(model_id).bytes

    @property
    def blocked(self) -> bool:
        """Whether the first need that is not met waits for what is leased or kept."""
        return self._policy.blocked

    def failure(self, model_id: str) -> LoadError | None:
        """Why the last load failed; None when it did not or is being tried again."""
        with self._lock:
            return self._policy.model(model_id).error

    def poll(self) -> list[Change]:
        """The changes since the last call, in order. Raises the error that ended the loader: a device that is lost."""
        with self._lock:
            if self._policy.broken:
                raise self._policy.broken
            changes, self._policy.changes = self._policy.changes, []
        return changes

    def close(self) -> None:
        """Take no more loads, and wait a little for the running one."""
        with self._lock:
            self._policy.closed = True
            self._lock.notify()
        self._loader.join(5)
