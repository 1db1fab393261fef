"""TextCache: outputs of text encoders, kept within a budget, so that a prompt asked again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from app.engine.row import Row
from app.families.base import Conditions, Family
from app.families.text import Encoder, States, read_texts
from app.request import Condition, Prompt

CUTS = 1024
"""Prompts whose cut ends are remembered."""


class TextCache:
    """Outputs by (encoder, text, length) in at most `budget` bytes of the device; the least recently used leaves first.

    Models that share an encoder share its outputs. The empty prompt of each encoder, at the length it was last asked
    for, stays whatever the budget. version: of a network's weights, which may have changed while they were away.
    """

    def __init__(self, budget: int, version: Callable[[object], int]) -> None:
        self.bytes = self._hits = self._misses = 0
        self._budget, self._version = budget, version
        self.kept: OrderedDict[tuple[Encoder, str, int], States] = OrderedDict()
        self._versions: dict[Encoder, int] = {}
        self._models: dict[Encoder, set[str]] = {}  # that asked for it
        self._empty: dict[Encoder, int] = {}  # the length at which its empty prompt was last asked for
        self._truncated = lru_cache(CUTS)(lambda family, *given: family.truncated(*given))

    def encode(self, family: Family, rows: list[Row], batch: int | None) -> list[Conditions]:
        """The conditions of each of these rows of one key, [1 or 2, ...] by name: its own, then the one for guidance.

        Texts that are not cached are encoded, in one batch for each encoder; the encoders must be on the device.
        batch: as `Family.encode`.
        """
        wanted = [_conditions(family, row) for row in rows]
        places = {one: place for place, one in enumerate(dict.fromkeys(one for both in wanted for one in both))}
        read = partial(self._read, family.card.id)
        encoded = family.encode(list(places), rows[0].key.text_length, batch, read)
        parts = {name: value.chunk(len(places)) for name, value in encoded.items()}
        return [
            {name: torch.cat([part[places[one]] for one in both]) for name, part in parts.items()} for both in wanted
        ]

    def cuts(self, family: Family, row: Row) -> list[str | None]:
        """The ends of the row's prompt, and of its negative prompt where it is guided, that no encoder sees."""
        return [self._truncated(family, one, row.key.text_length) for one in _conditions(family, row)]

    def forget(self, model: str) -> None:
        """Drop what is kept of a model; outputs of its encoders stay where other models asked for them too."""
        self._truncated.cache_clear()
        for encoder, models in list(self._models.items()):
            models.discard(model)
            if not models:
                del self._models[encoder]
                self._drop(encoder)

    def count(self) -> tuple[int, int]:
        """(hits, misses) since the last call, counted for each encoder and each text of a batch."""
        counted, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return counted

    def _read(self, model: str, encoder: Encoder, texts: Sequence[str], length: int, batch: int | None) -> States:
        """As `read_texts`, but encodes only the texts that are not cached."""
        version = self._version(encoder.network)
        if self._versions.setdefault(encoder, version) != version:
            self._drop(encoder)
            self._versions[encoder] = version
        self._models.setdefault(encoder, set()).add(model)
        unique = dict.fromkeys(texts)
        fresh = [text for text in unique if (encoder, text, length) not in self.kept]
        if fresh:
            outputs = read_texts(encoder, fresh, length, batch)
            for text, *states in zip(fresh, *(output.chunk(len(fresh)) for output in outputs), strict=True):
                kept = self.kept[encoder, text, length] = tuple(state.clone() for state in states)
                self.bytes += _bytes(kept)
        self._hits += len(unique) - len(fresh)
        self._misses += len(fresh)
        for text in unique:
            self.kept.move_to_end((encoder, text, length))
        if "" in unique:
            self._empty[encoder] = length
        found = [self.kept[encoder, text, length] for text in texts]
        self._trim()
        return tuple(torch.cat(states) for states in zip(*found, strict=True))

    def _trim(self) -> None:
        for name in list(self.kept) if self.bytes > self._budget else ():
            encoder, text, length = name
            if self.bytes > self._budget and (text or self._empty.get(encoder) != length):
                self.bytes -= _bytes(self.kept.pop(name))

    def _drop(self, encoder: Encoder) -> None:
        self._versions.pop(encoder, None)
        self._empty.pop(encoder, None)
        for name in [name for name in self.kept if name[0] == encoder]:
            self.bytes -= _bytes(self.kept.pop(name))


def _bytes(states: States) -> int:
    return sum(state.nbytes for state in states)


def _conditions(family: Family, row: Row) -> list[Condition]:
    condition = row.image.condition
    own = Prompt(condition.text) if isinstance(condition, Prompt) else condition
    return [own, family.opposite(condition)] if row.request.recipe.guidance.guided else [own]
