"""ModelFolder: the files of a card, and the one answer to whether they are here. The only reader of model_index.json.

It opens no weights beyond their first bytes and asks nobody: of a Hub repository it sees what the local cache holds.
Nothing that stands in a downloaded folder is trusted: names of parts cannot leave it, and class names are only passed
on, to be looked up in an allowlist (`app/families/components.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cards.files import (
    CONVERT,
    JSON_LIMIT,
    PICKLES,
    read_file,
    read_json,
    refuse_endless,
    refuse_foreign,
    weight_files,
)
from app.errors import CardError, CheckpointError, NotDownloaded

if TYPE_CHECKING:
    from app.cards.card import Card

INDEX = "model_index.json"

TOKENIZERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "CLIPTokenizerFast": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",),),
    "T5TokenizerFast": (("tokenizer.json",),),
}
"""The classes of tokenizers, each with the sets of files of which one set is enough. Every other class is a network."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a model: its name in model_index.json, its class, its folder with links resolved.

    file: where its weights are when they are not in the folder, but in a file of the authors' own layout.
    """

    name: str
    class_name: str
    folder: Path
    file: Path | None = None

    @property
    def weights(self) -> Path:
        """What to name when its weights are not right."""
        return self.file or self.folder

    def check(self) -> None:
        """Raises CheckpointError, naming the first of its files that is not here, or is none of a checkpoint."""
        choices = TOKENIZERS.get(self.class_name, (("config.json",),))
        found = [names for names in choices if all((self.folder / name).exists() for name in names)]
        if not found:
            raise CheckpointError(f"{self.folder / choices[0][0]}: missing")
        for name in found[0]:
            refuse_foreign(self.folder / name, "json")
        if self.class_name in TOKENIZERS:
            for file in _read_by_tokenizers(self.folder):
                refuse_endless(file)
        for file in () if self.class_name in TOKENIZERS else weight_files(self.weights):
            refuse_foreign(file)


class ModelFolder:
    """The folder of model_index.json that a card names, with the parts that it shares with other cards.

    cards: all of them, by id, of which `components` names some.
    """

    def __init__(self, card: Card, cards: Mapping[str, Card]) -> None:
        self.card, self._cards = card, cards

    @property
    def path(self) -> Path:
        """The folder: beside the card, or in the Hub cache. Raises CheckpointError: there is none; NotDownloaded."""
        source = self.card.source
        if source.repo is None:
            folder = (self.card.folder / (source.path or ".")).resolve()
            if not folder.is_dir():
                raise CheckpointError(f"{self.card.id}: the folder {folder} does not exist")
            return folder
        index = cached_index(source.repo, source.revision)
        if index is None:
            raise NotDownloaded(f"{self.card.id}: not downloaded: run `instep models pull {self.card.id}`")
        return index.parent.resolve()

    def here(self) -> bool:
        """Whether every file of every part is on this machine: settings, tokenizers, all shards, other cards' parts.

        It reads folders: a thread's work where an event loop must not wait for a disk.
        """
        return self.fault() is None

    def fault(self) -> CheckpointError | None:
        """What a load would raise for files that are missing or broken. It reads folders, as `here` does."""
        try:
            self.check()
        except CheckpointError as error:
            return error
        return None

    def check(self) -> list[Part]:
        """The parts, whose files are all here. Raises CheckpointError naming what is missing, NotDownloaded."""
        try:
            return self._checked()
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # no access, a name that no file system takes, a loop of links
            raise CheckpointError(f"{self.card.id}: its files cannot be read: {error}") from error

    def _checked(self) -> list[Part]:
        parts = self.parts()
        for part in parts:
            try:
                part.check()
            except CheckpointError as error:
                raise self._lacking(part, error) from error
        return parts

    def parts(self) -> list[Part]:
        """What model_index.json names, and `components` in their place. Raises CheckpointError, NotDownloaded."""
        card, index = self.card, self.path / INDEX
        shared = [self._shared(name, target) for name, target in card.components.items()]
        parts = [*self.own(), *shared]
        if not parts:
            raise CheckpointError(f"{index}: names no part of a model")
        unknown = sorted(card.files.keys() - {part.name for part in parts})
        if unknown:
            raise CheckpointError(f"{index}: {unknown[0]}: missing, though the card's files name it")
        return parts

    def own(self) -> list[Part]:
        """The parts of its own index, without those that `components` names. Raises as `parts`."""
        folder = self.path
        found = classes_in(folder / INDEX).items()
        return [self._part(name, kind, folder) for name, kind in found if name not in self.card.components]

    def _shared(self, name: str, target: str) -> Part:
        """A part that another card gives."""
        owner, _, part = target.partition("/")
        theirs = ModelFolder(self._cards[owner], self._cards)
        try:
            folder = theirs.path
        except NotDownloaded as error:
            raise self._to_pull(name) from error
        class_name = classes_in(folder / INDEX).get(part)
        if class_name is None:
            raise CheckpointError(
                f"{folder / INDEX}: {part}: missing, though another card's components.{name} names it"
            )
        return replace(theirs._part(part, class_name, folder), name=name)

    def _part(self, name: str, class_name: str, folder: Path) -> Part:
        """Raises CheckpointError: the file that the card names for it is missing, or a pickle."""
        if name not in self.card.files:
            return Part(name, class_name, (folder / name).resolve())
        file = (self.card.folder / self.card.files[name]).resolve()
        if file.suffix in PICKLES:
            raise CheckpointError(f"{file}: only safetensors are loaded ({CONVERT})")
        if not file.exists() or file.is_dir():
            raise CheckpointError(f"{file}: missing, though the card's files.{name} names it")
        return Part(name, class_name, (folder / name).resolve(), file)

    def _lacking(self, part: Part, error: CheckpointError) -> CheckpointError:
        """The error of a part whose files are not all here: what a download brings is not downloaded."""
        owner = self._cards.get(self.card.components.get(part.name, "").partition("/")[0], self.card)
        torch = any(path.suffix in PICKLES for path in part.folder.glob("*"))
        return error if owner.source.repo is None or part.file or torch else self._to_pull(part.name)

    def _to_pull(self, part: str) -> NotDownloaded:
        name = self.card.id
        return NotDownloaded(f"{name}: its {part} is not downloaded: run `instep models pull {name}`")


def _read_by_tokenizers(folder: Path) -> list[Path]:
    """The files that transformers may open in the folder of a tokenizer: its own choice, by name."""
    found = [*folder.glob("*"), *(folder / "additional_chat_templates").glob("*")]
    return [path for path in found if path.suffix in (".json", ".txt", ".model", ".jinja")]


def classes_in(index: Path) -> dict[str, str]:
    """The class of each part that a model_index.json names, less the scheduler and those that are absent.

    Raises CheckpointError naming the file: no such file, no name of a part, not a pair of library and class.
    """
    found = {}
    for name, entry in read_json(index).items():
        if name.startswith("_") or name == "scheduler" or not isinstance(entry, list) or entry == [None, None]:
            continue
        if not _NAME.fullmatch(name):
            raise CheckpointError(f'{index}: "{name}" is not the name of a part')
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise CheckpointError(f"{index}: {name}: not a pair of library and class")
        found[name] = str(entry[1])
    return found


def cached_index(repo: str, revision: str | None) -> Path | None:
    """model_index.json of a Hub repository's snapshot in the local cache; None while it is not downloaded."""
    # NOTE: imported late, by cards that name a repository alone: it takes a third of a second.
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, INDEX, revision=revision)
    except ValueError:  # no name of a repository: its load says so
        return None
    return Path(found) if isinstance(found, str) else None


def labels_of(card: Card) -> tuple[str, ...]:
    """A label model's class names: those of its model_index.json, else as many as `classes` says, by number.

    While the repository is not downloaded, the index that is shipped beside the card stands for its own. Raises
    CardError: ids that are not 0 to n - 1, another number of them than `classes` says.
    """
    if not card.draws_classes:
        return ()
    source = card.source
    own = cached_index(source.repo, source.revision) if source.repo else card.folder / str(source.path) / INDEX
    index = own or card.folder / INDEX
    labels = read_labels(index) if index.is_file() else ()
    if labels and card.classes not in (None, len(labels)):
        raise CardError(f"{card.folder / 'card.toml'}: classes: {card.classes}, but {index} names {len(labels)}")
    return labels or tuple(f"class {number}" for number in range(card.classes or 0))


def read_labels(index: Path) -> tuple[str, ...]:
    """The class names in order of id, none without `id2label`. Raises CardError unless the ids are 0 to n - 1."""
    try:
        named: Any = json.loads(read_file(index, JSON_LIMIT)).get("id2label") or {}
        labels = tuple(named[str(number)] for number in range(len(named)))
    except KeyError as error:
        raise CardError(f"{index}: id2label: {len(named)} classes, but none has the id {error.args[0]}") from error
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CardError(f"{index}: id2label: {error}") from error
    if not all(isinstance(label, str) for label in labels):
        raise CardError(f"{index}: id2label: a name that is not a text")
    return labels
