"""ModelFolder: the files of a card, and the one answer to whether they are here.

It opens no weights beyond their first bytes; of a Hub repository it sees what the local cache holds. Nothing in a
downloaded folder is trusted: names of parts cannot leave it, and class names are looked up in an allowlist
(`app/families/components.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.cards.card import Card, Source
from app.cards.files import (
    CONVERT,
    INDEX,
    PICKLES,
    cached_index,
    read_classes,
    read_json,
    refuse_endless,
    refuse_foreign,
    weight_files,
)
from app.errors import CheckpointError, NotDownloaded

TOKENIZERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "CLIPTokenizerFast": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",),),
    "T5TokenizerFast": (("tokenizer.json",),),
}
"""The classes of tokenizers with the sets of files of which one is enough. Every other class is a network."""


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a model: its name in model_index.json, its class, its folder with links resolved.

    file: the file of the authors' own layout that has its weights, if they are not in the folder.
    """

    name: str
    class_name: str
    folder: Path
    file: Path | None = None

    @property
    def weights(self) -> Path:
        """The path that errors about its weights name."""
        return self.file or self.folder

    def check(self) -> None:
        """Raises CheckpointError naming the first of its files that is missing or is no file of a checkpoint."""
        choices = TOKENIZERS.get(self.class_name, (("config.json",),))
        found = [names for names in choices if all((self.folder / name).exists() for name in names)]
        if not found:
            raise CheckpointError(f"{self.folder / choices[0][0]}: missing")
        for name in found[0]:
            refuse_foreign(self.folder / name, "json")
        if self.class_name in TOKENIZERS:
            # transformers chooses the files to open by name, among these.
            for file in (*self.folder.glob("*"), *(self.folder / "additional_chat_templates").glob("*")):
                if file.suffix in (".json", ".txt", ".model", ".jinja"):
                    refuse_endless(file)
        else:
            for file in weight_files(self.weights):
                refuse_foreign(file)


class ModelFolder:
    """The folder of model_index.json that a card names, with the parts that other cards share with it."""

    def __init__(self, card: Card, cards: Mapping[str, Card]) -> None:
        """cards: all of them by id, because `components` may name them."""
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

    def beside(self) -> ModelFolder:
        """The same model as the configs beside its cards describe it: they are there before a download."""
        owners = (self._cards[target.partition("/")[0]] for target in self.card.components.values())
        local = {
            one.id: one.model_copy(update={"source": Source(path=one.source.path or "."), "files": {}})
            for one in (*owners, self.card)
        }
        return ModelFolder(local[self.card.id], local)

    def here(self) -> bool:
        """Whether every file of every part is on this machine: configs, tokenizers, all shards, other cards' parts.

        It reads folders, so an event loop calls it in a thread.
        """
        return self.fault() is None

    def fault(self) -> CheckpointError | None:
        """The error that a load would raise for missing or broken files. It reads folders, as `here` does."""
        try:
            self.check()
        except CheckpointError as error:
            return error
        return None

    def check(self) -> list[Part]:
        """Return the parts if all files are here. Raises CheckpointError naming what is missing, NotDownloaded."""
        try:
            parts = self.parts()
            for part in parts:
                try:
                    part.check()
                except CheckpointError as error:
                    raise self._lacking(part, error) from error
            return parts
        except (OSError, ValueError, RuntimeError) as error:  # no access, an impossible name, a loop of links
            raise CheckpointError(f"{self.card.id}: its files cannot be read: {error}") from error

    def parts(self) -> list[Part]:
        """The parts that model_index.json and `components` name. Raises CheckpointError, NotDownloaded."""
        index = self.path / INDEX
        shared = [self._shared(name, target) for name, target in self.card.components.items()]
        parts = [*self.own(), *shared]
        if not parts:
            raise CheckpointError(f"{index}: names no part of a model")
        unknown = sorted(self.card.files.keys() - {part.name for part in parts})
        if unknown:
            raise CheckpointError(f"{index}: {unknown[0]}: missing, though the card's files name it")
        return parts

    def own(self) -> list[Part]:
        """The parts of its own index, without those that `components` names. Raises as `parts`."""
        folder = self.path
        found = read_classes(folder / INDEX).items()
        return [self._part(name, kind, folder) for name, kind in found if name not in self.card.components]

    def index(self) -> dict[str, Any]:
        """Everything that model_index.json says, with other cards' entries for shared parts. Raises as `parts`."""
        found = read_json(self.path / INDEX)
        for name, target in self.card.components.items():
            owner, _, part = target.partition("/")
            found[name] = read_json(ModelFolder(self._cards[owner], self._cards).path / INDEX).get(part)
        return found

    def _shared(self, name: str, target: str) -> Part:
        """A part of another card."""
        owner, _, part = target.partition("/")
        theirs = ModelFolder(self._cards[owner], self._cards)
        try:
            folder = theirs.path
        except NotDownloaded as error:
            raise self._to_pull(name) from error
        class_name = read_classes(folder / INDEX).get(part)
        if class_name is None:
            raise CheckpointError(
                f"{folder / INDEX}: {part}: missing, though another card's components.{name} names it"
            )
        return replace(theirs._part(part, class_name, folder), name=name)

    def _part(self, name: str, class_name: str, folder: Path) -> Part:
        """Raises CheckpointError for a missing or pickled file of the card's `files`."""
        if name not in self.card.files:
            return Part(name, class_name, (folder / name).resolve())
        file = (self.card.folder / self.card.files[name]).resolve()
        if file.suffix in PICKLES:
            raise CheckpointError(f"{file}: only safetensors are loaded ({CONVERT})")
        if not file.exists() or file.is_dir():
            raise CheckpointError(f"{file}: missing, though the card's files.{name} names it")
        return Part(name, class_name, (folder / name).resolve(), file)

    def _lacking(self, part: Part, error: CheckpointError) -> CheckpointError:
        """NotDownloaded in place of the error of a part that a download brings."""
        owner = self._cards.get(self.card.components.get(part.name, "").partition("/")[0], self.card)
        torch = any(path.suffix in PICKLES for path in part.folder.glob("*"))
        return error if owner.source.repo is None or part.file or torch else self._to_pull(part.name)

    def _to_pull(self, part: str) -> NotDownloaded:
        name = self.card.id
        return NotDownloaded(f"{name}: its {part} is not downloaded: run `instep models pull {name}`")
