"""Pool: which models are on the device. Loads them in the background and leases them.

Knows nothing of requests or batches. Components (a network, a VAE, a text encoder) are what is loaded and leased:
two models that name the same one share it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from app.card import Card
from app.errors import LoadError, ModelNotFound
from app.families import FAMILIES
from app.families.base import Family
from app.pool.building import build_family, build_part, part_dtype
from app.pool.layout import Part, read_parts
from app.report import ModelState, State

RETRY_AFTER = 30.0
"""Seconds that a failed load stands before it is tried again."""

_Key = tuple[Path, torch.dtype, tuple[float | None, ...]]
_log = logging.getLogger(__name__)


@dataclass
class _Component:
    """One built part on the device. leases: the rows that hold a model which uses it."""

    value: Any
    bytes: int
    leases: int = 0


@dataclass
class _Model:
    state: State = "absent"
    family: Family | None = None
    components: list[_Component] = field(default_factory=list)
    error: LoadError | None = None
    since: float = 0.0


class Lease:
    """A hold on a loaded model and on each of its components; release it once, or more often to no effect."""

    def __init__(self, model: Family, release: Callable[[], None]) -> None:
        self.model = model
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """End the hold; later calls do nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Pool:
    """The models of these cards on one device. Every method is thread-safe and returns at once."""

    def __init__(
        self, cards: Mapping[str, Card], device: str, dtype: torch.dtype, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """dtype: of the networks; a VAE on the CPU is float32 always. clock: seconds, for the wait after a failure."""
        self.cards, self.device, self.dtype = dict(cards), torch.device(device), dtype
        self._clock = clock
        self._lock = threading.Lock()
        self._models = {model_id: _Model() for model_id in self.cards}
        self._components: dict[_Key, _Component] = {}
        self._changes: list[ModelState] = []
        self._wanted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._loader = threading.Thread(target=self._load_wanted, name="loader", daemon=True)
        self._loader.start()

    def want(self, model_id: str) -> None:
        """Start loading in the background if absent, or if it failed over 30 s ago. Raises ModelNotFound."""
        with self._lock:
            model = self._model(model_id)
            retry = model.state == "failed" and self._clock() - model.since >= RETRY_AFTER
            if model.state == "absent" or retry:
                model.error = None
                self._change(model_id, "loading")
                self._wanted.put(model_id)

    def lease(self, model_id: str) -> Lease | None:
        """A hold on the model, or None while it is not ready. Raises ModelNotFound."""
        with self._lock:
            model = self._model(model_id)
            if model.family is None:
                return None
            held = list(model.components)
            for component in held:
                component.leases += 1
        return Lease(model.family, lambda: self._end(held))

    def failure(self, model_id: str) -> LoadError | None:
        """Why the last load failed; None when it did not or is being tried again. Raises ModelNotFound."""
        with self._lock:
            return self._model(model_id).error

    def poll(self) -> list[ModelState]:
        """The changes of state since the last call, in order."""
        with self._lock:
            changes, self._changes = self._changes, []
        return changes

    def close(self) -> None:
        """Take no more loads; waits a little for the one that runs."""
        self._wanted.put(None)
        self._loader.join(timeout=5)

    def _model(self, model_id: str) -> _Model:
        try:
            return self._models[model_id]
        except KeyError:
            raise ModelNotFound(f'no model "{model_id}"', param="model") from None

    def _end(self, held: list[_Component]) -> None:
        with self._lock:
            for component in held:
                component.leases -= 1

    def _change(self, model_id: str, state: State, detail: str = "", seconds: float = 0.0) -> None:
        model = self._models[model_id]
        model.state, model.since = state, self._clock()
        size = sum(component.bytes for component in model.components)
        self._changes.append(ModelState(model_id, state, detail, seconds, size))

    def _load_wanted(self) -> None:
        """The loader thread: one load at a time, so that a shared component is never built twice."""
        while (model_id := self._wanted.get()) is not None:
            start = time.monotonic()
            try:
                self._load(model_id, start)
            except LoadError as error:
                self._fail(model_id, error)
            except torch.OutOfMemoryError:
                self._fail(model_id, LoadError(f"{model_id}: not enough memory on {self.device}"))
            except Exception as error:
                _log.exception("loading %s", model_id)
                self._fail(model_id, LoadError(f"{model_id}: cannot be loaded ({type(error).__name__})"))

    def _load(self, model_id: str, start: float) -> None:
        card = self.cards[model_id]
        built = {part.name: self._component(card, part) for part in read_parts(card, self.cards)}
        values = {name: component.value for name, component in built.items()}
        family = build_family(card, values, self.device, self.dtype)
        with self._lock:
            model = self._models[model_id]
            model.family, model.components = family, list(built.values())
            self._change(model_id, "ready", seconds=time.monotonic() - start)

    def _component(self, card: Card, part: Part) -> _Component:
        dtype = part_dtype(part, self.device, self.dtype)
        key = (part.folder, dtype, FAMILIES[card.family].traits(card, part.name))
        if key not in self._components:
            value = build_part(part, self.device, self.dtype)
            component = _Component(value, _bytes(value))
            with self._lock:
                self._components[key] = component
        return self._components[key]

    def _fail(self, model_id: str, error: LoadError) -> None:
        """Record the reason, and drop the components that were built for this model alone."""
        with self._lock:
            used = {id(component) for model in self._models.values() for component in model.components}
            self._components = {key: part for key, part in self._components.items() if id(part) in used}
            # A new object: the caught one holds, by its traceback, all that was loaded until it was raised.
            self._models[model_id].error = type(error)(error.message)
            self._change(model_id, "failed", detail=error.message)


def _bytes(value: Any) -> int:
    """Bytes of a network's parameters and buffers; 0 for a tokenizer."""
    if not isinstance(value, torch.nn.Module):
        return 0
    tensors = {id(tensor): tensor for tensor in (*value.parameters(), *value.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
