"""TextCache: outputs of text encoders, kept within a budget, so that a prompt asked again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch

from app.engine.row import Row
from app.families.base import Conditions, Family
from app.families.text import Encoder, States, read_texts
from app.request import Condition, Prompt

CUTS = 1024
"""Prompts of a model whose cut ends are remembered."""

Name = tuple[Encoder, str, int]


@dataclass(slots=True)
class _Known:
    """version: of an encoder's weights. models: those that asked for it. empty: the last length of the empty prompt."""

    version: int
    models: set[str] = field(default_factory=set)
    empty: int = -1


class TextCache:
    """Outputs by (encoder, text, length) in at most `budget` bytes of the device; the least recently used leaves first.

    Models that share an encoder share its outputs. The empty prompt of each encoder, at the length it was last asked
    for, stays whatever the budget. version: of a network's weights, which may have changed while they were away.
    """

    def __init__(self, budget: int, version: Callable[[object], int]) -> None:
        self.bytes = 0
        self._budget, self._version = budget, version
        self._kept: OrderedDict[Name, States] = OrderedDict()
        self._known: dict[Encoder, _Known] = {}
        self._truncated: dict[str, Callable[..., str | None]] = {}
        self._hits = self._misses = 0

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
        if family.card.id not in self._truncated:
            self._truncated[family.card.id] = lru_cache(CUTS)(family.truncated)
        truncated = self._truncated[family.card.id]
        return [truncated(condition, row.key.text_length) for condition in _conditions(family, row)]

    def forget(self, model: str) -> None:
        """Drop what is kept of a model; outputs of its encoders stay where other models asked for them too."""
        self._truncated.pop(model, None)
        for encoder, known in list(self._known.items()):
            known.models.discard(model)
            if not known.models:
                self._drop(encoder)

    def count(self) -> tuple[int, int]:
        """(hits, misses) since the last call, counted for each encoder and each text of a batch."""
        counted, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return counted

    def _read(self, model: str, encoder: Encoder, texts: Sequence[str], length: int, batch: int | None) -> States:
        """As `read_texts`, but encodes only the texts that are not cached."""
        known = self._meet(encoder)
        known.models.add(model)
        unique = dict.fromkeys(texts)
        fresh = [text for text in unique if (encoder, text, length) not in self._kept]
        self._hits += len(unique) - len(fresh)
        if fresh:
            outputs = read_texts(encoder, fresh, length, batch)
            for text, *states in zip(fresh, *(output.chunk(len(fresh)) for output in outputs), strict=True):
                kept = self._kept[encoder, text, length] = tuple(state.clone() for state in states)
                self.bytes += _bytes(kept)
        self._misses += len(fresh)
        for text in unique:
            self._kept.move_to_end((encoder, text, length))
        known.empty = length if "" in unique else known.empty
        found = [self._kept[encoder, text, length] for text in texts]
        self._trim()
        return tuple(torch.cat(states) for states in zip(*found, strict=True))

    def _meet(self, encoder: Encoder) -> _Known:
        """The entry of an encoder on the device; a new one when its weights have changed."""
        version, known = self._version(encoder.network), self._known.get(encoder)
        if known is not None and known.version != version:
            self._drop(encoder)
            known = None
        return known or self._known.setdefault(encoder, _Known(version))

    def _trim(self) -> None:
        staying = {(encoder, "", known.empty) for encoder, known in self._known.items()}
        while self.bytes > self._budget and (name := next((n for n in self._kept if n not in staying), None)):
            self.bytes -= _bytes(self._kept.pop(name))

    def _drop(self, encoder: Encoder) -> None:
        del self._known[encoder]
        for name in [name for name in self._kept if name[0] == encoder]:
            self.bytes -= _bytes(self._kept.pop(name))


def _bytes(states: States) -> int:
    return sum(state.nbytes for state in states)


def _conditions(family: Family, row: Row) -> list[Condition]:
    own = Prompt(row.condition.text) if isinstance(row.condition, Prompt) else row.condition
    return [own, family.opposite(row.condition)] if row.request.recipe.guidance.guided else [own]
