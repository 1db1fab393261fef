"""Layout: where the files of a card are, and which parts its model_index.json names (the diffusers folder layout).

Knows nothing of weights or modules. Nothing that stands in a downloaded folder is trusted: class names come from the
allowlist, names of parts cannot leave the folder, no code is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from app.card import Card
from app.errors import CheckpointError, NotDownloaded
from app.families import FAMILIES
from app.families.components import read_json
from app.pool.weights import CONVERT, PICKLES

CLIPS_BY_DEFAULT = frozenset(
    f"{name}Scheduler" for name in ("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "CogVideoXDDIM")
)
"""diffusers' classes that clip samples when their config does not say (besides those of other tasks)."""

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


def source_folder(card: Card, model: str = "") -> Path:
    """The card's folder of files: beside the card, or in the local Hub cache. Raises CheckpointError, NotDownloaded;
    asks nobody. model: the one that needs them, where that is another."""
    if card.source.repo is None:
        folder = (card.folder / (card.source.path or ".")).resolve()
        if not folder.is_dir():
            raise CheckpointError(f"{card.id}: the folder {folder} does not exist")
        return folder
    try:
        found = snapshot_download(card.source.repo, revision=card.source.revision, local_files_only=True)
    except (OSError, ValueError) as error:  # LocalEntryNotFoundError is both
        name = model or card.id
        raise NotDownloaded(f"{name}: not downloaded: run `instep models pull {name}`") from error
    return Path(found).resolve()


def read_parts(card: Card, cards: Mapping[str, Card]) -> list[Part]:
    """The parts to build for a card: its own model_index.json's, with those of `card.components` in their place.

    Raises CheckpointError: a missing or corrupt index, a class outside the allowlist, a part the family has no use
    for or misses, a schedule that clips.
    """
    folder = source_folder(card)
    index = read_json(folder / "model_index.json")
    own = {name: entry for name, entry in index.items() if not name.startswith("_") and isinstance(entry, list)}
    check_schedule(folder / "scheduler" / "scheduler_config.json")
    own.pop("scheduler", None)
    family = FAMILIES[card.family]
    parts = []
    for name, entry in own.items():
        class_name = _class_of(folder / "model_index.json", name, entry)
        if class_name is not None and name not in card.components:
            parts.append(Part(name, class_name, folder / name, _file(card, name)))
    for name, target in card.components.items():
        parts.append(_shared(name, target, cards, card.id))
    for part in parts:
        if part.class_name not in family.parts.get(part.name, ()):
            raise CheckpointError(
                f'{card.id}: {part.name}: "{part.class_name}" is not a class that {card.family} loads'
            )
    missing = [name for name in family.required if name not in {part.name for part in parts}]
    if missing:
        raise CheckpointError(f"{folder / 'model_index.json'}: {missing[0]}: missing, and {card.family} needs it")
    unknown = sorted(card.files.keys() - {part.name for part in parts})
    if unknown:
        raise CheckpointError(f"{folder / 'model_index.json'}: {unknown[0]}: missing, though the card's files name it")
    return [replace(part, folder=part.folder.resolve()) for part in parts]


def check_schedule(file: Path) -> None:
    """Refuse a checkpoint whose samples are clipped or thresholded: that is not affine, and no table can hold it."""
    if not file.is_file():
        return
    config = read_json(file)
    name = str(config.get("_class_name", ""))
    for field, default in (("clip_sample", name in CLIPS_BY_DEFAULT), ("thresholding", False)):
        if config.get(field, default):
            why = "" if field in config else f" (the default of {name})"
            raise CheckpointError(f"{file}: {field} is true{why}: clipped samples cannot be served")


def _shared(name: str, target: str, cards: Mapping[str, Card], model: str) -> Part:
    owner, _, part = target.partition("/")
    folder = source_folder(cards[owner], model)
    file = folder / "model_index.json"
    class_name = _class_of(file, part, read_json(file).get(part))
    if class_name is None:
        raise CheckpointError(f"{file}: {part}: missing, though another card's components.{name} names it")
    return Part(name, class_name, folder / part, _file(cards[owner], part))


def _file(card: Card, name: str) -> Path | None:
    """The file that the card names for this part, with links resolved. Raises CheckpointError: missing, a pickle."""
    if name not in card.files:
        return None
    file = (card.folder / card.files[name]).resolve()
    if file.suffix in PICKLES:
        raise CheckpointError(f"{file}: only safetensors are loaded ({CONVERT})")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, though the card's files.{name} names it")
    return file


def _class_of(file: Path, name: str, entry: Any) -> str | None:
    """The class of an entry `[library, class]`; None for an absent part `[null, null]`."""
    if entry in (None, [None, None]):
        return None
    if not _NAME.fullmatch(name):
        raise CheckpointError(f'{file}: "{name}" is not the name of a part')
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        raise CheckpointError(f"{file}: {name}: not a pair of library and class")
    return str(entry[1])
