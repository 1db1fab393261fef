"""Downloads: whether the files that a card names are on this machine.

Knows nothing of what is in them: it looks at names alone, and asks nobody. What they hold is checked when they load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from app.card import INDEX, Card
from app.labels import cached_index

_SHARD = re.compile(r".*-[0-9]{5}-of-([0-9]{5})\.safetensors")


def downloaded(card: Card, cards: Mapping[str, Card]) -> bool:
    """Whether every part of this card has its files here, those of other cards' that it shares too.

    cards: all of them, by id. It reads folders: a thread's work where an event loop must not wait for a disk.
    """
    folder = _source(card)
    own = _parts(folder) if folder else []
    if folder is None or not (own or card.files or card.components):
        return False
    shared = (_of(cards[owner], part) for owner, _, part in (to.partition("/") for to in card.components.values()))
    return all(shared) and all(_of(card, part) for part in {*own, *card.files} if part not in card.components)


def _of(card: Card, part: str) -> bool:
    """Whether this part of this card has its files."""
    if part in card.files:
        return (card.folder / card.files[part]).is_file()
    folder = _source(card)
    return folder is not None and _whole(folder / part)


def _source(card: Card) -> Path | None:
    """The folder of model_index.json; None where there is none."""
    if card.source.repo:
        index = cached_index(card.source.repo, card.source.revision)
    else:
        index = card.folder / str(card.source.path) / INDEX
    return index.parent if index and index.is_file() else None


def _parts(folder: Path) -> list[str]:
    """The parts that model_index.json names; none where it cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        named = {name: entry for name, entry in index.items() if not name.startswith("_") and name != "scheduler"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return []
    return [name for name, entry in named.items() if isinstance(entry, list) and entry != [None, None]]


def _whole(folder: Path) -> bool:
    """Weights with all their shards, or a tokenizer's files."""
    try:
        names = [file.name for file in folder.iterdir()]
    except OSError:
        return False
    if folder.name.startswith("tokenizer"):
        return bool(names)
    shards = [found for found in map(_SHARD.fullmatch, names) if found]
    return len(shards) == int(shards[0][1]) if shards else any(name.endswith(".safetensors") for name in names)
