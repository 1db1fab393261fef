"""Encodings: what text encoders gave, kept within a budget, so that a prompt asked again is not encoded again.

Knows nothing of slots or steps, nor of how a family joins the encoders' outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from app.engine.row import Row
from app.families.base import Conditions, Family
from app.families.text import Encoder, States, read_texts
from app.request import Condition, Prompt

CUTS = 1024
"""Prompts of which it is remembered what no encoder sees."""

Name = tuple[Encoder, str, int]


@dataclass(slots=True)
class _Known:
    """An encoder that has something here. version: of its weights. models: those that asked for it.

    empty: the length of the empty prompt that was asked for last.
    """

    version: int
    models: set[str] = field(default_factory=set)
    empty: int = -1


class Encodings:
    """Outputs by (encoder, text, length) in at most `budget` bytes of the device; the least recently used leaves first.

    Models that share an encoder share what it gave. Of each encoder the empty prompt, at the length it was last asked
    for, stays while one of the encoder's models does, whatever the budget. version: of a network's weights, which may
    have changed while they were away.
    """

    def __init__(self, budget: int, version: Callable[[object], int]) -> None:
        self.bytes = 0
        self._budget, self._version = budget, version
        self._kept: OrderedDict[Name, States] = OrderedDict()
        self._known: dict[Encoder, _Known] = {}
        self._cuts: OrderedDict[tuple[str, Condition, int], str | None] = OrderedDict()
        self._hits = self._misses = 0

    def of(self, family: Family, rows: list[Row], batch: int | None) -> list[Conditions]:
        """The conditions of each of these rows of one key, [1 or 2, ...] by name: its own, then what guidance leaves.

        What is not kept is encoded, by each encoder in one batch; the encoders must be on the device. batch: as
        `Family.encode`.
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
        """The end that no encoder sees of the row's prompt, and of its negative prompt where it is guided; None for
        one that is seen whole."""
        return [
            self._cut(family, (row.key.model, condition, row.key.text_length)) for condition in _conditions(family, row)
        ]

    def _cut(self, family: Family, name: tuple[str, Condition, int]) -> str | None:
        if name not in self._cuts:
            self._cuts[name] = family.truncated(*name[1:])
        self._cuts.move_to_end(name)
        if len(self._cuts) > CUTS:
            self._cuts.popitem(last=False)
        return self._cuts[name]

    def forget(self, model: str) -> None:
        """Drop what is kept of a model, and of its encoders all that no other model asked for."""
        for name in [name for name in self._cuts if name[0] == model]:
            del self._cuts[name]
        for encoder, known in list(self._known.items()):
            known.models.discard(model)
            if not known.models:
                self._drop(encoder)

    def count(self) -> tuple[int, int]:
        """(hits, misses) since the last call: texts of a batch that were kept, or encoded, each encoder's counted."""
        counted, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return counted

    def _read(self, model: str, encoder: Encoder, texts: Sequence[str], length: int, batch: int | None) -> States:
        """As `read_texts`, of those texts alone that are not kept."""
        known = self._meet(encoder)
        known.models.add(model)
        unique = dict.fromkeys(texts)
        fresh = [text for text in unique if (encoder, text, length) not in self._kept]
        self._hits += len(unique) - len(fresh)
        if fresh:
            outputs = read_texts(encoder, fresh, length, batch)
            for text, *states in zip(fresh, *(output.chunk(len(fresh)) for output in outputs), strict=True):
                self._keep((encoder, text, length), tuple(state.clone() for state in states))
        self._misses += len(fresh)
        for text in unique:
            self._kept.move_to_end((encoder, text, length))
        known.empty = length if "" in unique else known.empty
        found = [self._kept[encoder, text, length] for text in texts]
        self._trim()
        return tuple(torch.cat(states) for states in zip(*found, strict=True))

    def _meet(self, encoder: Encoder) -> _Known:
        """What is known of an encoder on the device; nothing any more of one whose weights are others."""
        version, known = self._version(encoder.network), self._known.get(encoder)
        if known is not None and known.version != version:
            self._drop(encoder)
            known = None
        return known or self._known.setdefault(encoder, _Known(version))

    def _keep(self, name: Name, states: States) -> None:
        self._kept[name] = states
        self.bytes += _bytes(states)

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
