"""Registry: the cards by every name a user may call them.

Knows nothing of HTTP, weights or workers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy

from app.cards.card import Card
from app.cards.cards import Cards
from app.cards.folder import ModelFolder
from app.cards.hints import did_you_mean
from app.errors import CardError, ModelNotFound, NotDownloaded, SettingsError
from app.logs import logger
from app.samplers.table import valid_samplers
from app.settings import Settings

log = logger("instep")

_OPENAIS = re.compile(r"(gpt-image|chatgpt-image|dall-e)-[\w.-]{1,48}", re.ASCII)
"""Names of OpenAI's models, which many clients send without asking their user."""

BUILT_IN = "emoji-mmdit"
"""The card that draws where nothing else is said: its files come with the project."""

SHIPPED = frozenset(
    (
        *(BUILT_IN, "emoji-mmdit-turbo", "emoji-dit", "dit-xl-2-256", "dit-xl-2-512", "flux.1-dev", "flux.1-schnell"),
        *("sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"),
    )
)
"""The cards that come with the project; every other one is a user's."""


class Registry:
    """Cards by id and alias, and the card of a request that names none. all: those too that a key may not use."""

    def __init__(self, cards: Mapping[str, Card], settings: Settings) -> None:
        """Skips a card whose default sampler does not go with its schedule.

        Raises SettingsError when there is no card or DEFAULT_MODEL names an unknown one.
        """
        cards = self.cards = self.all = sound(cards)
        if not cards:
            why = next(
                (error.message for error in cards.skipped.values()), f"expected {settings.models}/<id>/card.toml"
            )
            raise SettingsError(f"no cards in {settings.models}: {why}")
        self._names = {name: card for card in cards.values() for name in (card.id, *card.aliases)}
        if settings.default_model and settings.default_model not in self._names:
            message = f'default_model: no card is named "{settings.default_model}"'
            raise SettingsError(f"{message}{cards.reason(settings.default_model)}", param="default_model")
        ranked = sorted(cards.values(), key=lambda card: rank(card, cards))
        named = [self._names[settings.default_model]] if settings.default_model else []
        self._by_rank = [*named, *ranked]
        self.default = self._by_rank[0]

    def find(self, name: str | None) -> Card:
        """The card of this id or alias; the default one for None and "". Raises ModelNotFound."""
        if not name:
            return self.default
        if name in self._names:
            return self._names[name]
        raise self.missing(name)

    def missing(self, name: str) -> ModelNotFound:
        """The error that says that no card here has this name, and which do."""
        hint = did_you_mean(name, self._names, otherwise=f"; there are {', '.join(self.cards)}")
        if _OPENAIS.fullmatch(name):
            prompts = (card.id for card in (self.default, *self.cards.values()) if not card.draws_classes)
            model = next(prompts, self.default.id)
            hint = f"; start the server with --alias {name}={model} (INSTEP_ALIAS) to have {model} draw it"
        return ModelNotFound(f'There is no model "{name[:64]}"{hint}', param="model")

    def only(self, models: frozenset[str]) -> Registry:
        """The same with these ids alone, the others as if they were not there.

        The default is the server's if it is among them, else the next in rank.
        """
        view = copy(self)
        view.cards = Cards({name: card for name, card in self.cards.items() if name in models})
        view._names = {name: card for name, card in self._names.items() if card.id in models}
        view.default = next(card for card in self._by_rank if card.id in models)
        return view

    def names(self, card: Card) -> tuple[str, ...]:
        """Every name of a card, its id first."""
        return (card.id, *card.aliases)


def rank(card: Card, cards: Mapping[str, Card]) -> tuple[bool, ...]:
    """How late a card comes when a request names none: first a user's that is here and draws prompts, then the built-in
    one, then what is here, then what draws prompts; among equals the order of their folders."""
    here, prompts = ModelFolder(card, cards).here(), not card.draws_classes
    return not (here and prompts and card.id not in SHIPPED), not (here and card.id == BUILT_IN), not here, not prompts


def sound(cards: Mapping[str, Card]) -> Cards:
    """The cards whose default sampler goes with their schedule; the others are skipped."""
    found = Cards(cards)
    for card in cards.values():
        try:
            check_sampler(card)
        except CardError as error:
            found.skip(card.file, error, card)
    return found


def check_sampler(card: Card) -> None:
    """Raises CardError when the card's default sampler is not one of its schedule's."""
    names = valid_samplers(card.schedule)
    if card.defaults.sampler not in names:
        file = card.folder / "card.toml"
        raise CardError(f'{file}: defaults.sampler: "{card.defaults.sampler}" is not one of {", ".join(names)}')


def warn_of(cards: Cards) -> None:
    """One line of the log for each card that is skipped, and for each model with files that are missing or broken."""
    for error in cards.skipped.values():
        log.error("card skipped", reason=error.message)
    for card in cards.values():
        fault = ModelFolder(card, cards).fault()
        if fault and not isinstance(fault, NotDownloaded):
            log.error("model cannot be loaded", model=card.id, reason=fault.message)
