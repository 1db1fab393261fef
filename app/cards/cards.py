"""Cards: the cards of a folder, and why others of it are skipped; reading one opens no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from app.cards.adapters import variant
from app.cards.card import Card, valid_alias
from app.cards.files import INDEX, cached_file, read_labels, read_toml
from app.errors import CardError, SettingsError, first_problem


class Cards(dict[str, Card]):
    """Cards by id. skipped: the error of each card.toml that cannot be served, by its file. read: the cards by their
    files, without the aliases of the setting ALIAS."""

    def __init__(self, cards: Mapping[str, Card] | None = None) -> None:
        super().__init__(cards or {})
        self.skipped: dict[Path, CardError] = dict(cards.skipped) if isinstance(cards, Cards) else {}
        self._reasons: dict[str, CardError] = dict(cards._reasons) if isinstance(cards, Cards) else {}
        self.read: dict[Path, Card] = dict(cards.read) if isinstance(cards, Cards) else {}

    @classmethod
    def of(cls, found: Mapping[Path, Card], errors: Mapping[Path, CardError]) -> Cards:
        """Make Cards of these, and skip each one with a name that is another's id or that an earlier one has."""
        cards, found = cls(), dict(sorted(found.items(), key=lambda item: item[0]))
        for file, error in errors.items():
            cards.skip(file, error)
        owners = {card.id: file for file, card in reversed(found.items())}
        for file, card in found.items():
            if name := next((name for name in card.names if owners.get(name, file) != file), ""):
                cards.skip(file, CardError(f"{file}: the name {name} is already used by {owners[name]}"), card)
            else:
                cards[card.id] = card
                owners |= dict.fromkeys(card.names, file)
        cards.check_others()
        cards.read = {file: card for file, card in found.items() if cards.get(card.id) is card}
        return cards

    @property
    def owners(self) -> dict[str, Card]:
        """Every card by each of its names."""
        return {name: card for card in self.values() for name in card.names}

    @property
    def models(self) -> dict[str, Card]:
        """The cards with weights of their own; an engine knows no others."""
        return {name: card for name, card in self.items() if not card.base}

    def skip(self, file: Path, error: CardError, card: Card | None = None) -> None:
        """Leave this file out, and all cards that depend on its card."""
        self.skipped[file] = error
        self._reasons = {**dict.fromkeys((file.parent.name, *(card.names if card else ())), error), **self._reasons}
        if card and self.get(card.id) is card:
            del self[card.id]
            self.check_others()

    def check_others(self) -> None:
        """Skip every card with a base, a refiner or `components` that name a card or a folder that does not exist."""
        for card in list(self.values()):
            if card.id in self and card.model not in self:
                self.skip(card.file, CardError(f"{card.file}: base: {card.base} is gone{self.reason(card.base)}"), card)
            if card.id in self and card.refiner and card.refiner.model not in self.owners:
                message = f"{card.file}: refiner: there is no model {card.refiner.model}"
                self.skip(card.file, CardError(f"{message}{self.reason(card.refiner.model)}"), card)
            for part, target in card.components.items():
                owner, _, rest = target.partition("/")
                if card.id in self and (owner not in self or not rest or ".." in rest.split("/")):
                    message = f'{card.file}: components.{part}: "{target}" is not "<card id>/<folder>"'
                    self.skip(card.file, CardError(f"{message}{self.reason(owner)}"), card)

    def reason(self, name: str) -> str:
        """The end of a message about a name that no card has: why its card was skipped, or nothing."""
        error = None if name in self else self._reasons.get(name)
        return f"; {error.message}" if error else ""

    def add_aliases(self, setting: str) -> None:
        """Add the aliases of the setting ALIAS: `alias=model`, comma separated, where a model is an id or alias.

        Raises SettingsError: no such model, a name that is taken or no alias.
        """
        owners = self.owners
        for entry in filter(None, (part.strip() for part in setting.split(","))):
            alias, equals, target = (part.strip() for part in entry.partition("="))
            try:
                if not (equals and target):
                    raise ValueError(f'"{entry[:128]}" is not alias=model, as in gpt-image-1=emoji-mmdit')
                valid_alias(alias)
                if target not in owners:
                    why = self.reason(target) or f"; there are {', '.join(self)}"
                    raise ValueError(f'no card is named "{target[:128]}"{why}')
                if taken := self.owners.get(alias):
                    raise ValueError(f'"{alias}" is a name of {taken.id} already')
            except ValueError as error:
                raise SettingsError(f"alias: {error}", param="alias") from None
            card = self[owners[target].id]
            self[card.id] = card.model_copy(update={"aliases": (*card.aliases, alias)})


def read_card(file: Path, bases: Mapping[str, Card] | None = None) -> Card:
    """Read and validate one card.toml. bases: by id, for a variant. Raises CardError naming the file and the field."""
    try:
        raw = read_toml(file)
        if filled := raw.keys() & {"folder", "labels", "adapters"}:
            raise ValueError(f"{min(filled)}: unknown field")
        if raw.keys() & {"base", "loras"}:
            if not (base := (bases or {}).get(str(raw.get("base")))):
                raise ValueError(f'base: no card with weights of its own has the id "{raw.get("base", "")}"')
            raw = variant(raw, base.model_dump())
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"{file}: {error}") from error
    try:
        card = Card(**{**raw, "folder": file.parent.resolve()})
    except ValidationError as error:
        place, reason = first_problem(error.errors())
        raise CardError(": ".join(filter(None, (str(file), ".".join(place), reason)))) from error
    try:
        return card if card.base else card.model_copy(update={"labels": _labels(card)})
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise CardError(f"{file}: source: {error}") from error


def read_files(folder: Path) -> tuple[dict[Path, Card], dict[Path, CardError]]:
    """Every `<folder>/<id>/card.toml`, read or with its error; one that is a link without a file is an error too."""
    found: dict[Path, Card] = {}
    errors: dict[Path, CardError] = {}
    files = sorted(entry / "card.toml" for entry in folder.glob("*"))
    for file in (*files, *files):  # twice, because a variant may come before its base
        bases = {card.id: card for card in found.values() if not card.base}
        try:
            found[file] = found.get(file) or read_card(file, bases)
            errors.pop(file, None)
        except CardError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError) or file.is_symlink():
                errors[file] = error
    return found, errors


def read_cards(folder: Path, aliases: str = "") -> Cards:
    """The cards of a folder, with the aliases of the setting ALIAS; one that is invalid is among `skipped`.

    Raises SettingsError as `add_aliases`.
    """
    cards = Cards.of(*read_files(folder))
    cards.add_aliases(aliases)
    return cards


def _labels(card: Card) -> tuple[str, ...]:
    """The class names of its model_index.json, else as many numbered ones as `classes` says; none for prompts.

    Before a repository is downloaded, the index beside the card stands for its own. Raises CardError.
    """
    if not card.draws_classes:
        return ()
    source = card.source
    own = cached_file(source.repo, source.revision) if source.repo else card.folder / str(source.path) / INDEX
    index = own or card.folder / INDEX
    labels = read_labels(index) if index.is_file() else ()
    if labels and card.classes not in (None, len(labels)):
        raise CardError(f"{card.file}: classes: {card.classes}, but {index} names {len(labels)}")
    return labels or tuple(f"class {number}" for number in range(card.classes or 0))
