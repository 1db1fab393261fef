"""Encodings: the encoded conditions used last, so that a prompt asked twice, or the empty one, is encoded once.

Knows nothing of slots or steps.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from app.engine.row import Row
from app.families.base import Conditions, Family
from app.request import Condition, Prompt

KEPT = 64
"""Encoded conditions kept for reuse; the empty prompt of guided rows is the one that matters."""

Name = tuple[str, Condition, int]


class Encodings:
    """Conditions of one pass each, by model, condition and text length; the least recently used leaves first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Name, tuple[Conditions, str | None]] = OrderedDict()

    def prepare(self, family: Family, rows: list[Row], batch: int | None) -> None:
        """Encode, in one batch, what these rows of one key need and is not kept; then `of` has it for each of them."""
        wanted = dict.fromkeys(name for row in rows for name in _names(family, row))
        fresh = [name for name in wanted if name not in self._kept]
        if fresh:
            encoded = family.encode([condition for _, condition, _ in fresh], fresh[0][2], batch)
            for place, name in enumerate(fresh):
                one = {key: value[place : place + 1].clone() for key, value in encoded.items()}
                self._kept[name] = one, family.truncated(name[1], name[2])
        for name in wanted:
            self._kept.move_to_end(name)
        while len(self._kept) > max(KEPT, len(wanted)):
            self._kept.popitem(last=False)

    def forget(self, model: str) -> None:
        """Drop what is kept of a model."""
        for name in [name for name in self._kept if name[0] == model]:
            del self._kept[name]

    def of(self, family: Family, row: Row) -> Conditions:
        """The row's conditions, [1 or 2, ...] by name: its own, then the one that guidance moves away from."""
        parts = [self._kept[name][0] for name in _names(family, row)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def cut(self, family: Family, row: Row) -> str | None:
        """The end of the row's prompt that no encoder sees; None when nothing is cut."""
        return self._kept[_names(family, row)[0]][1]


def _names(family: Family, row: Row) -> list[Name]:
    own = Prompt(row.condition.text) if isinstance(row.condition, Prompt) else row.condition
    both = [own, family.opposite(row.condition)] if row.request.guided else [own]
    return [(row.key.model, condition, row.key.text_length) for condition in both]
