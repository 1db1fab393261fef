"""Classes of a label model: from an id or a name to an index, and search by name.

Knows nothing of HTTP or of the request body.
"""

from __future__ import annotations

from functools import lru_cache

from app.cards.card import Card
from app.cards.hints import did_you_mean
from app.errors import InvalidValue


def find_label(card: Card, given: int | str, field: str = "class_label") -> int:
    """The index of a class given by id, by full name, or by one of the synonyms of an ImageNet-like "tench, Tinca".

    Raises InvalidValue naming the range, the ids of an ambiguous name, or the nearest names.
    """
    last = len(card.labels) - 1
    if last < 0:
        raise InvalidValue(f"{field}: {card.id} has no class names; its model_index.json lacks id2label", param=field)
    if isinstance(given, str):
        found = _named(card, given)
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(map(str, found))
            raise InvalidValue(f"{field}: several classes of {card.id} have this name; use an id: {ids}", param=field)
        if not (given.isascii() and given.isdigit() and len(given) < 10):
            hint = did_you_mean(given, card.labels, most=3, otherwise=f"; see /v1/models/{card.id}/classes?q=")
            raise InvalidValue(f"{field}: {card.id} has no such class{hint}", param=field)
        given = int(given)
    if not 0 <= given <= last:
        raise InvalidValue(f"{field}: expects a class id from 0 to {last}, or a name", param=field)
    return given


def search(card: Card, query: str | None) -> list[tuple[int, str]]:
    """(id, name) of the classes whose name holds the query in any case, or whose id it is; all of them without one."""
    words = (query or "").strip().casefold()
    return [(i, name) for i, name in enumerate(card.labels) if words in name.casefold() or words == str(i)]


def _named(card: Card, name: str) -> list[int]:
    full, parts = _ids(card.labels)
    wanted = name.strip().casefold()
    return full.get(wanted) or parts.get(wanted, [])


@lru_cache(maxsize=32)
def _ids(labels: tuple[str, ...]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The ids of the classes with a full name, and with a synonym; both in lower case."""
    full: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for index, label in enumerate(map(str.casefold, labels)):
        full.setdefault(label, []).append(index)
        for part in {part.strip() for part in label.split(",")}:
            parts.setdefault(part, []).append(index)
    return full, parts
