"""Aliases: further names of models, from their cards and from the server's settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from app.errors import SettingsError

if TYPE_CHECKING:
    from app.cards.card import Card
    from app.cards.cards import Cards

_ALIAS = re.compile(r"[^\s/,=][^/,=]*(/[^/,=]+)*")
_ROUTES = ("classes", "load", "unload")
"""Last words of /v1/models/{model}/..., so no name of a model may end in them."""


def valid_alias(text: str) -> str:
    """The alias, if it may be one. Raises ValueError.

    It may have slashes, as the repositories of the Hub do, and must be what a setting and an address can hold.
    """
    parts = text.split("/")
    fits = _ALIAS.fullmatch(text) and len(text) <= 128 and text.isprintable() and text == text.strip()
    if not fits or {".", ".."} & set(parts) or parts[-1] in _ROUTES:
        raise ValueError(
            f'"{text[:128]}" is no alias: 1 to 128 printable characters without "," and "=", with something on both '
            f"sides of a slash, and not ending in /{', /'.join(_ROUTES)}"
        )
    return text


def with_aliases(cards: Cards, setting: str) -> dict[str, Card]:
    """The same cards with the aliases of the setting: `alias=model`, comma separated, where a model is an id or alias.

    Raises SettingsError: no such model, a name that is taken, one that stands there twice, one that is no alias.
    """
    owners = {name: card.id for card in cards.values() for name in (card.id, *card.aliases)}
    taken, found = dict(owners), dict(cards)
    for alias, target in _pairs(setting):
        if target not in owners:
            why = cards.reason(target) or f"; there are {', '.join(cards)}"
            raise _error(f'no card is named "{target[:128]}"{why}')
        if alias in taken:
            raise _error(f'"{alias}" is a name of {taken[alias]} already')
        taken[alias] = model = owners[target]
        found[model] = found[model].model_copy(update={"aliases": (*found[model].aliases, alias)})
    return found


def _pairs(setting: str) -> Iterator[tuple[str, str]]:
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        alias, equals, target = (part.strip() for part in entry.partition("="))
        if not (equals and target):
            raise _error(f'"{entry[:128]}" is not alias=model, as in gpt-image-1=emoji-mmdit')
        try:
            yield valid_alias(alias), target
        except ValueError as error:
            raise _error(str(error)) from None


def _error(message: str) -> SettingsError:
    return SettingsError(f"alias: {message}", param="alias")
