"""Pool: which weights are on the device. Brings them in the background, leases them, and makes room.

Knows nothing of requests or batches. Components (a network, a VAE, a text encoder) are what moves and what is leased:
two models that name the same one share it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from app.cards.card import Card
from app.errors import LoadError
from app.families.base import Family
from app.pool.books import Books, Change
from app.pool.component import Component
from app.pool.loader import Loader
from app.pool.need import Need
from app.report import Phase


class Lease:
    """A hold on the parts of one phase of a model; release it once, or more often to no effect."""

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

    What is leased is never moved; of the rest, what was leased longest ago leaves first: to host memory beside a GPU,
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
        self._books = Books(self.cards, device, budget, host if self.device.type != "cpu" else 0, clock)
        self._lock = self._books.wake
        self._loader = Loader(self._books, self.cards, self.device, dtype, compiled)

    def want(self, model_id: str) -> None:
        """Start loading in the background if absent, or if it failed over 30 s ago. Raises ModelNotFound."""
        with self._lock:
            self._books.want(model_id)

    def unload(self, model_id: str) -> None:
        """Take the model off the device and out of host memory, once nobody leases it. Raises ModelNotFound."""
        with self._lock:
            self._books.unload(model_id)

    def need(self, needs: Sequence[Need], kept: Collection[str] = ()) -> None:
        """What rows wait for now, most urgent first; each call replaces the last. Raises ModelNotFound.

        kept: models whose parts stay for now, whoever asks less than urgently. Whoever waited must lease what came
        before the next call: until then nothing else moves.
        """
        with self._lock:
            self._books.need(needs, kept)

    def lease(self, model_id: str, phase: Phase) -> Lease | None:
        """A hold on the parts of a phase, or None while they are not all there. Raises ModelNotFound."""
        with self._lock:
            if not self._resident(model_id, phase):
                return None
            model = self._books.models[model_id]
            held = model.components((phase,))
            for one in held:
                one.leases += 1
                one.used = time.monotonic()
        assert model.family is not None
        return Lease(model.family, lambda: self._end(held))

    def resident(self, model_id: str, phase: Phase) -> bool:
        """Whether a lease would be given now. Raises ModelNotFound."""
        with self._lock:
            return self._resident(model_id, phase)

    def family(self, model_id: str) -> Family | None:
        """The model as code and configuration, wherever its weights are; None until it was ready once."""
        with self._lock:
            return self._books.model(model_id).family

    def version(self, network: object) -> int:
        """Of a part that is leased: another number once its weights came from files that had changed."""
        with self._lock:
            return next((one.version for one in self._books.store.components.values() if one.value is network), 0)

    def fits(self, model_id: str) -> bool:
        """Whether all parts of a built model can be on the device together. Raises ModelNotFound."""
        with self._lock:
            return self._books.model(model_id).bytes <= self._books.store.budget

    def size(self, model_id: str) -> int:
        """Bytes of the weights of all parts; 0 until the model was built once. Raises ModelNotFound."""
        with self._lock:
            return self._books.model(model_id).bytes

    @property
    def blocked(self) -> bool:
        """Whether the first need that is not met waits for what is leased or kept."""
        return self._books.blocked

    def failure(self, model_id: str) -> LoadError | None:
        """Why the last load failed; None when it did not or is being tried again. Raises ModelNotFound."""
        with self._lock:
            return self._books.model(model_id).error

    def poll(self) -> list[Change]:
        """What has happened since the last call, in order. Raises what ended the loader: a device that is lost."""
        with self._lock:
            if self._books.broken:
                raise self._books.broken
            changes, self._books.changes = self._books.changes, []
        return changes

    def close(self) -> None:
        """Take no more loads; waits a little for the one that runs."""
        with self._lock:
            self._books.closed = True
            self._lock.notify()
        self._loader.join(5)

    def _resident(self, model_id: str, phase: Phase) -> bool:
        model = self._books.model(model_id)
        return model.state == "ready" and all(one.place == "device" for one in model.components((phase,)))

    def _end(self, held: list[Component]) -> None:
        with self._lock:
            for one in held:
                one.leases -= 1
            self._lock.notify()
