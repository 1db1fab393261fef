"""Cards: those of one folder by id, and why others that stand there are left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import CardError

if TYPE_CHECKING:
    from app.cards.card import Card


class Cards(dict[str, "Card"]):
    """Cards by id. skipped: why a card.toml cannot be served, by its file; the message names the file and the field."""

    def __init__(self, cards: Mapping[str, Card] | None = None) -> None:
        super().__init__(cards or {})
        self.skipped: dict[Path, CardError] = dict(cards.skipped) if isinstance(cards, Cards) else {}
        self._names: dict[str, CardError] = dict(cards._names) if isinstance(cards, Cards) else {}

    def skip(self, file: Path, error: CardError, card: Card | None = None) -> None:
        """Note that this file is left out, and with its card those that would take parts of it."""
        self.skipped[file] = error
        names = (card.id, *card.aliases) if card else ()
        self._names = {**dict.fromkeys((file.parent.name, *names), error), **self._names}
        if card and self.get(card.id) is card:
            del self[card.id]
            self.check_components()

    def check_components(self) -> None:
        """Skip every card whose `components` name what is not there."""
        for card in list(self.values()):
            for part, target in card.components.items():
                owner, _, rest = target.partition("/")
                if card.id in self and (owner not in self or not rest or ".." in rest.split("/")):
                    message = f'{card.file}: components.{part}: "{target}" is not "<card id>/<folder>"'
                    self.skip(card.file, CardError(f"{message}{self.reason(owner)}"), card)

    def check_aliases(self) -> None:
        """Skip every card with an alias that is an id, or an alias of a card before it."""
        before: dict[str, Card] = {}
        for card in list(self.values()):
            owners = {name: owner.file for name, owner in {**before, **self}.items() if owner.id in self}
            name = next((alias for alias in card.aliases if alias in owners), None)
            if name is None:
                before |= dict.fromkeys(card.aliases, card)
            elif card.id in self:
                self.skip(card.file, taken(card.file, name, owners[name]), card)

    def reason(self, name: str) -> str:
        """The end of a message about a name that no card has: why its card was skipped, or nothing."""
        error = None if name in self else self._names.get(name)
        return f"; {error.message}" if error else ""


def taken(file: Path, name: str, owner: Path) -> CardError:
    """The error of a card that has a name which another has."""
    return CardError(f"{file}: the name {name} is already used by {owner}")
