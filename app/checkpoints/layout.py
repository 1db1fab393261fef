"""Layout: the parts of a card that its family builds, of those that its folder names (the diffusers folder layout).

Knows nothing of weights or modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from app.cards.card import Card
from app.cards.files import INDEX
from app.cards.folder import ModelFolder, Part
from app.cards.noise import check_schedule
from app.errors import CheckpointError
from app.families import FAMILIES


def read_parts(card: Card, cards: Mapping[str, Card]) -> list[Part]:
    """The parts to build for a card: its own model_index.json's, with those of `card.components` in their place.

    Raises CheckpointError: a missing or corrupt index, a class outside the allowlist, a part the family has no use
    for or misses, a schedule that clips, files that are not here; NotDownloaded where a download brings them.
    """
    folder, required = ModelFolder(card, cards), FAMILIES[card.family].required
    parts = folder.parts()
    check_schedule(folder.path)
    check_classes(card, parts)
    missing = [name for name in required if name not in {part.name for part in parts}]
    if missing:
        raise CheckpointError(f"{folder.path / INDEX}: {missing[0]}: missing, and {card.family} needs it")
    return folder.check()


def check_classes(card: Card, parts: Iterable[Part]) -> None:
    """Raises CheckpointError at a part that the card's family has no use for, or of a class that it does not load."""
    for part in parts:
        if part.class_name not in FAMILIES[card.family].parts.get(part.name, ()):
            raise CheckpointError(
                f'{card.id}: {part.name}: "{part.class_name}" is not a class that {card.family} loads'
            )
