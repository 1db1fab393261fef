"""Catalog: find a model, or a class of one, by the name that a user writes; suggest the nearest name otherwise."""

import difflib
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Self

from app.cards.adapters import MOST_LORAS, Adapter, Lora
from app.cards.card import Card
from app.cards.cards import Cards, read_files
from app.cards.folder import ModelFolder
from app.cards.refiners import latent_facts, unlike
from app.errors import CardError, InvalidValue, ModelNotFound, NotDownloaded, SettingsError
from app.logs import logger
from app.settings import Settings

log = logger("instep")

Adapters = dict[str, Adapter]

_OPENAIS = re.compile(r"(gpt-image|chatgpt-image|dall-e)-[\w.-]{1,48}", re.ASCII)
"""Names of OpenAI's models, which many clients send without asking their user."""

BUILT_IN = "emoji-mmdit"
"""The default model of a server without other models: its files come with the project."""

SHIPPED = frozenset(
    (
        *(BUILT_IN, "emoji-mmdit-turbo", "emoji-dit", "dit-xl-2-256", "dit-xl-2-512", "flux.1-dev", "flux.1-schnell"),
        *("sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"),
        *("sd1.5", "sd2.1", "sd2.1-base", "sd-turbo", "sdxl", "sdxl-turbo", "sdxl-refiner"),
    )
)
"""The cards that come with the project; every other one is a user's."""

LONGEST = 64
"""Characters of a word that are compared with names."""

COMPARED = 32
"""Names that difflib compares: those that share most pairs of letters with the word. It takes 10 ms for a thousand."""


class Registry:
    """Cards by id and alias, and the default card. `all` has the cards too that a key may not use.

    adapters: the LoRAs here by name, which each card has too; None until it is known what they fit.
    """

    def __init__(self, cards: Mapping[str, Card], settings: Settings, adapters: Adapters | None = None) -> None:
        """Raises SettingsError when there is no card or DEFAULT_MODEL names an unknown one."""
        cards = self.cards = self.all = Cards(cards)
        wanted = settings.adapters or any(card.loras for card in cards.values())
        self.adapters = {} if adapters is None and not wanted else adapters
        cards.update({one.id: one.model_copy(update={"adapters": self.adapters or {}}) for one in cards.values()})
        if not cards:
            errors = (error.message for error in cards.skipped.values())
            why = next(errors, f"expected {settings.models}/<id>/card.toml")
            raise SettingsError(f"no cards in {settings.models}: {why}")
        self._owners = cards.owners
        if settings.default_model and settings.default_model not in self._owners:
            message = f'default_model: no card is named "{settings.default_model}"'
            raise SettingsError(f"{message}{cards.reason(settings.default_model)}", param="default_model")
        named = [self._owners[settings.default_model]] if settings.default_model else []
        self._by_rank = [*named, *sorted(cards.values(), key=lambda card: _rank(card, cards))]
        self.default = self._by_rank[0]
        self._views: dict[object, Self] = {}
        self._latents = {card.id: latent_facts(card, cards) for card in cards.models.values()}

    def find(self, name: str | None) -> Card:
        """The card of this id or alias; the default one for None and "". Raises ModelNotFound."""
        if not name:
            return self.default
        if name in self._owners:
            return self._owners[name]
        raise self.missing(name)

    def refiner(self, card: Card, name: str) -> Card:
        """Find a refiner for this card by its name. Raises ModelNotFound, NotDownloaded; InvalidValue: it does not
        fit."""
        if name not in self._owners:
            raise self.missing(name, "refiner.model")
        found = self._owners[name]
        for one in (card.model, found.model):
            self._latents[one] = self._latents[one] or latent_facts(self.all[one], self.all)  # its files may be new
            fault = None if self._latents[one] else ModelFolder(self.all[one], self.all).fault()
            if isinstance(fault, NotDownloaded):
                raise fault
        if why := self._unlike(card, found):
            message = f"refiner.model: {found.id} cannot go on with pictures of {card.id}: {why}"
            raise InvalidValue(message, param="refiner.model")
        return found

    def refiners(self, card: Card) -> list[str]:
        """The ids of the other models that can be refiners of this one."""
        return [one.id for one in self.cards.values() if not self._unlike(card, one)]

    def _unlike(self, base: Card, refiner: Card) -> str:
        return unlike(base, refiner, self._latents[base.model], self._latents[refiner.model])

    def missing(self, name: str, param: str = "model") -> ModelNotFound:
        """The error for a name that no card has, with the names that exist."""
        hint = did_you_mean(name, self._owners, otherwise=f"; there are {', '.join(self.cards)}")
        if _OPENAIS.fullmatch(name):
            prompts = (card.id for card in (self.default, *self.cards.values()) if not card.draws_classes)
            model = next(prompts, self.default.id)
            hint = f"; start the server with --alias {name}={model} (INSTEP_ALIAS) to have {model} draw it"
        return ModelNotFound(f'There is no model "{name[:64]}"{hint}', param=param)

    def only(self, models: frozenset[str], loras: frozenset[str] = frozenset()) -> Self:
        """A view of these cards and LoRAs alone, of all where none is named; the same one for the same names.

        Its default is the server's if it is among them, else the next in rank.
        """
        if (models, loras) not in self._views:
            view = self._views[models, loras] = copy(self)
            view.cards = Cards({name: card for name, card in self.cards.items() if name in models or not models})
            view._owners = {name: card for name, card in self._owners.items() if card.id in view.cards}
            view.default = next(card for card in self._by_rank if card.id in view.cards)
            shown = {card.model for card in view.cards.values()}
            found = [one.only(shown) if models else one for one in (self.adapters or {}).values()]
            found = [one for one in found if (one.fits or one.problem) and (one.name in loras or not loras)]
            view.adapters = self.adapters and {one.name: one for one in found}
        return self._views[models, loras]


def _rank(card: Card, cards: Mapping[str, Card]) -> tuple[bool, ...]:
    """Sort key of the default model: first what is no variant, then a user's that is here and draws prompts, then the
    built-in one, then what is here, then what draws prompts; equals keep the order of their folders."""
    here, prompts = ModelFolder(card, cards).here(), not card.draws_classes
    user = here and prompts and card.id not in SHIPPED
    return bool(card.base), not user, not (here and card.id == BUILT_IN), not here, not prompts


def read_again(settings: Settings, old: Cards) -> Cards:
    """The cards as their files are now; one that is invalid, or names files that are not here, stays as it was.

    Raises SettingsError as `add_aliases`, and for cards that would leave out an old one.
    """
    found, errors = read_files(settings.models)
    cards = Cards.of(found, errors)
    for file, card in cards.read.items():
        before = old.read.get(file, card)
        if card != before and (fault := ModelFolder(card, cards).fault()) and ModelFolder(before, old).here():
            errors[file] = CardError(f"{file}: {fault.message}")
    found |= {file: card for file, card in old.read.items() if file in errors}
    cards = Cards.of(found, errors)
    for file in found.keys() & old.read.keys() - cards.read.keys():
        raise SettingsError((cards.skipped.get(file) or cards.skipped[found[file].file]).message)
    cards.add_aliases(settings.alias)
    return cards


def warn_of(cards: Cards) -> None:
    """Log one line for each card that is skipped, and for each model with files that are missing or broken."""
    for error in cards.skipped.values():
        log.error("card skipped", reason=error.message)
    for card in cards.models.values():
        fault = ModelFolder(card, cards).fault()
        if fault and not isinstance(fault, NotDownloaded):
            log.error("model cannot be loaded", model=card.id, reason=fault.message)


def faults(registry: Registry) -> list[tuple[Path, str]]:
    """What is wrong with LoRAs and refiners, by file: LoRAs that fit no model, tensors that have no place in a model
    that they fit, variants that cannot have theirs, and cards with a refiner that does not fit."""
    found = []
    for one in (registry.adapters or {}).values():
        found += [(one.file, one.problem)] if one.problem else []
        found += [
            (one.file, f"{len(fit.unmatched)} tensors have no place in {name}, the first: {fit.unmatched[0]}")
            for name, fit in one.fits.items()
            if fit.unmatched
        ]
    for card in registry.all.values():
        try:
            find_adapters(card, (), registry.adapters or {})
            if card.refiner:
                registry.refiner(card, card.refiner.model)
        except NotDownloaded:
            continue  # whether it fits shows when its configs are here
        except InvalidValue as error:
            found.append((card.file, error.message))
    return found


def find_label(card: Card, label: int | str, field: str = "class_label") -> int:
    """The index of a class by id, full name, or one of the synonyms of an ImageNet-like "tench, Tinca".

    Raises InvalidValue naming the range, the ids of an ambiguous name, or the nearest names.
    """
    last = len(card.labels) - 1
    if last < 0:
        raise InvalidValue(f"{field}: {card.id} has no class names; its model_index.json lacks id2label", param=field)
    if isinstance(label, str):
        full, synonyms = _ids(card.labels)
        name = label.strip().casefold()
        found = full.get(name) or synonyms.get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(map(str, found))
            raise InvalidValue(f"{field}: several classes of {card.id} have this name; use an id: {ids}", param=field)
        if not (label.isascii() and label.isdigit() and len(label) < 10):
            hint = did_you_mean(label, card.labels, most=3, otherwise=f"; see /v1/models/{card.id}/classes?q=")
            raise InvalidValue(f"{field}: {card.id} has no such class{hint}", param=field)
        label = int(label)
    if not 0 <= label <= last:
        raise InvalidValue(f"{field}: expects a class id from 0 to {last}, or a name", param=field)
    return label


def find_adapters(card: Card, asked: Sequence[Lora], known: Adapters) -> tuple[tuple[str, float], ...]:
    """The names and weights that a recipe has for these entries of `loras`, which go before those of a variant's card.

    known: the LoRAs that may be asked for. Raises InvalidValue naming the entry, or the model for one of its card.
    """
    found: dict[str, float] = {}
    for entries, there, field in ((card.loras, card.adapters, "model"), (asked, known, "loras.{}.name")):
        for place, one in enumerate(entries):
            if one.name not in fitting(card, there):
                raise _unfit(card, one.name, known, field.format(place))
            if one.name in (other.name for other in entries[:place]):
                raise InvalidValue(f"{field.format(place)}: {one.name} is named twice", param=field.format(place))
            found[one.name] = one.weight
    used = sorted((name, weight) for name, weight in found.items() if weight)
    if len(used) > MOST_LORAS:
        message = f"loras: {len(used)} with those of {card.id}; a picture has at most {MOST_LORAS}"
        raise InvalidValue(message, param="loras")
    return tuple(used)


def fitting(card: Card, adapters: Adapters) -> list[str]:
    """The names of those that fit a card."""
    return [one.name for one in adapters.values() if card.model in one.fits]


def _unfit(card: Card, name: str, known: Adapters, field: str) -> InvalidValue:
    if adapter := known.get(name):
        why = f"fits {', '.join(adapter.fits)}" if adapter.fits else f"cannot be used: {adapter.problem}"
        return InvalidValue(f"{field}: {name} does not fit {card.id}; it {why}", param=field)
    names = fitting(card, known)
    hint = did_you_mean(name, names, otherwise=f"; {card.id} takes {', '.join(names) or 'none of those here'}")
    return InvalidValue(f'{field}: there is no LoRA "{name[:64]}"{hint}', param=field)


def search(card: Card, query: str | None) -> list[tuple[int, str]]:
    """(id, name) of the classes with the query in their names, in any case, or as their id; all without a query."""
    words = (query or "").strip().casefold()
    return [(i, name) for i, name in enumerate(card.labels) if words in name.casefold() or words == str(i)]


@lru_cache(maxsize=32)
def _ids(labels: tuple[str, ...]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The ids of the classes by full name, and by synonym; both in lower case."""
    full: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index, label in enumerate(map(str.casefold, labels)):
        full.setdefault(label, []).append(index)
        for part in {part.strip() for part in label.split(",")}:
            synonyms.setdefault(part, []).append(index)
    return full, synonyms


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, otherwise: str = "") -> str:
    """The end of a message: `; did you mean "this" or "that"?`, or `otherwise` where no name is near."""
    near = nearest(word, known, most)
    quoted = " or ".join(f'"{name}"' for name in near)
    return f"; did you mean {quoted}?" if near else otherwise


def nearest(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Up to `most` of the known names that contain `word` or are spelled nearly so, in any case."""
    wanted, (folded, having) = word[: 4 * LONGEST].strip().casefold()[:LONGEST], _indexed(tuple(known))
    found = [name for name in folded if wanted in name] if len(wanted) > 2 else []
    if not found:
        shared = Counter(name for pair in _pairs(wanted) for name in having.get(pair, ()))
        alike = heapq.nlargest(COMPARED, shared, key=lambda name: shared[name] / (len(wanted) + len(name)))
        found = difflib.get_close_matches(wanted, alike, n=most)
    return [folded[name] for name in found[:most]]


@lru_cache(maxsize=32)
def _indexed(known: tuple[str, ...]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Names by their folded form, and the folded names by each pair of letters in them."""
    folded = {name.casefold(): name for name in known}
    having: dict[str, list[str]] = {}
    for name in folded:
        for pair in _pairs(name):
            having.setdefault(pair, []).append(name)
    return folded, having


def _pairs(word: str) -> set[str]:
    return {word[place : place + 2] for place in range(len(word) - 1)}
