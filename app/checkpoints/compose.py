"""Compose the card of a user's files: where each part comes from, what is missing, and the folder that is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.cards.card import ID, Card, read_card
from app.cards.catalog import Registry
from app.cards.files import INDEX, read_toml, to_toml
from app.cards.folder import ModelFolder
from app.cards.noise import changes, schedule_of
from app.checkpoints.identify import CardConfigs, FoundPart, Inventory, configs_of, short, take_inventory
from app.checkpoints.parts import prove
from app.errors import CheckpointError, LoadError
from app.families import FAMILIES

OWN = ("id", "like", "aliases", "source", "components", "files", "bytes", "gated")
"""Fields of a card that are not taken from the one that it is like."""

Kind = Literal["whole", "original", "plain", "folder", "card"]


@dataclass
class Draft:
    """A card to be written for the files at `path`, like another card. cards: all of them by id.

    parts: of each where it comes from. "whole": the diffusers folder `path`; "original": a file by its authors' names;
    "plain": a file by diffusers' names; "folder": a folder of its own; "card": "<id>/<folder>" of another card.
    """

    like: CardConfigs
    path: Path
    cards: Mapping[str, Card]
    parts: dict[str, tuple[Kind, Path | str]] = field(default_factory=dict)

    def of(self, kind: Kind) -> dict[str, Any]:
        """The places of the parts of one kind."""
        return {part: place for part, (own, place) in self.parts.items() if own == kind}

    @property
    def whole(self) -> bool:
        """Whether the files are a diffusers folder, and not one part of it or a file."""
        return (self.path / INDEX).is_file()

    @property
    def missing(self) -> list[str]:
        """The parts of the card it is like that are not here."""
        return self.like.missing(self.parts)

    @property
    def schedule(self) -> dict[str, Any]:
        """The card's `schedule`: that of the card it is like, with the files' own facts. Raises CheckpointError."""
        raw = read_toml(self.like.card.file)["schedule"]
        return schedule_of(self.path, raw) if self.whole else raw

    def take(self, part: str, place: Path) -> None:
        """A part from a place of its own, instead of the one that is there. Raises CheckpointError, LoadError."""
        if part not in self.like.parts:
            raise LoadError(f"{flag(part)}: {self.like.card.id} has no such part")
        place = place / part if (place / INDEX).is_file() else place
        fitting = (one for one in take_inventory(place).parts.values() if self.like.differences(part, one) == [])
        found = next(fitting, None)
        if found is None:
            raise CheckpointError(f"{place}: is not the {part} of {self.like.card.id}")
        self._replace(part, _kind(found), place)

    def take_tokenizers(self, place: Path) -> None:
        """Those of the folder that the model has a use for. Raises LoadError: there are none."""
        named = [part for part in self.like.parts if part.startswith("tokenizer") and (place / part).is_dir()]
        if not named:
            raise LoadError(f"{place}: there is no folder tokenizer, tokenizer_2 or tokenizer_3 in it")
        for part in named:
            self._replace(part, "folder", place / part)

    def _replace(self, part: str, kind: Kind, place: Path) -> None:
        if self.whole:
            raise LoadError(f"{self.path}: is a whole model; parts of it cannot be given beside it")
        self.parts[part] = kind, place

    def take_rest(self, owner: Card) -> None:
        """What is still missing, from another card. Raises LoadError: it is of another kind."""
        other = configs_of(owner, self.cards)
        if other is None or owner.family != self.like.card.family:
            raise LoadError(f"--rest {owner.id}: it is no {self.like.card.family}, as {self.like.card.id} is")
        for part in self.missing:
            if part in other.parts and self.like.parts[part].class_name == other.parts[part].class_name:
                self.parts[part] = "card", owner.components.get(part, f"{owner.id}/{part}")

    def refuse_gaps(self) -> None:
        """Raises LoadError when a part is missing that the model cannot do without, with what to do."""
        encoders = sorted(part for part in self.parts if part.startswith("text_encoder"))
        needed = [*FAMILIES[self.like.card.family].required, *(f"tokenizer{one[12:]}" for one in encoders)]
        if gaps := [part for part in needed if part not in self.parts]:
            words = (f"{flag(part)} PATH" if part[:9] != "tokenizer" else "--tokenizers FOLDER" for part in gaps)
            flags = "" if self.whole else f"{' '.join(dict.fromkeys(words))}, or "
            rest = f"--rest {self.like.card.id} to take what is missing from that card"
            raise LoadError(f"{self.path}: {', '.join(gaps)} missing: give {flags}{rest}")

    def left_out(self, found: Inventory) -> list[str]:
        """A line for each encoder that the model will be without, with the reason where the files have one."""
        without = self.like.card.facts.without
        odd = {part: f": {short(reason)}" for part, reason in found.odd.items()}
        absent = [part for part in self.missing if part in without]
        return [f"without {part}{odd.get(part, '')} ({without[part]})" for part in absent]

    def own_schedule(self) -> list[str]:
        """A line for what the folder's own scheduler_config.json says otherwise than the card that it is like."""
        found = changes(self.like.card.schedule, self.schedule)
        return [f"the schedule is the folder's own: {', '.join(found)}"] if found else []

    def write(self, folder: Path) -> None:
        """The card's folder, named as its id; nothing stays of one that could not be written or is not right.

        Raises CardError, LoadError: no model can be built of it.
        """
        folder.mkdir()
        file, like = folder / "card.toml", self.like.card
        try:
            if not self.whole:
                self._write_layout(folder)
            card = {
                "id": folder.name,
                "like": like.id,
                **{name: value for name, value in read_toml(like.file).items() if name not in OWN},
                "schedule": self.schedule,
                "source": {"path": str(self.path) if self.whole else "."},
            }
            tables = {"components": self.of("card"), "files": {k: str(v) for k, v in self.of("original").items()}}
            card |= {name: table for name, table in tables.items() if table}
            lines = [f"{name} = {to_toml(value)}" for name, value in card.items()]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            prove(read_card(file), self.cards)
        except BaseException as error:
            shutil.rmtree(folder)
            if isinstance(error, LoadError):
                raise type(error)(error.message.replace(str(file), str(self.path))) from error
            raise

    def _write_layout(self, folder: Path) -> None:
        """model_index.json, the configs of parts in files, and links to the folders of others."""
        like, plain = ModelFolder(self.like.card, self.cards).beside(), self.of("plain")
        absent = self.like.missing(self.parts.keys() - self.of("card").keys())
        index = {name: value for name, value in like.index().items() if name not in absent}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        configs = {part: self.like.parts[part].folder for part in (*self.of("original"), *plain)}
        for part, place in {**configs, "scheduler": like.path / "scheduler"}.items():
            for file in sorted(place.glob("*config.json")):
                (folder / part).mkdir(exist_ok=True)
                shutil.copyfile(file, folder / part / file.name)
        for part, place in self.of("folder").items():
            (folder / part).symlink_to(place)
        for part, file in plain.items():
            (folder / part / "model.safetensors").symlink_to(file)


def draft(found: Inventory, registry: Registry, like: str | None) -> Draft:
    """The card that these files are like, with the parts that they have. Raises CheckpointError, LoadError."""
    path = found.path
    if found.pickled:
        raise LoadError(f"{path}: a server does not load torch files; first: instep models convert")
    found.check()
    fits = {one.card.id: (one, parts) for one, parts in (found.fits if like else found.bases)}
    wanted = registry.find(like).id if like else None
    if wanted and wanted not in fits:
        raise CheckpointError(f"{path}: is not like {wanted}; it fits {', '.join(fits)}")
    if not all("transformer" in parts for _, parts in fits.values()):
        raise LoadError(f"{path}: the network is not in it; this goes beside one (--vae, --text-encoder ...)")
    if wanted is None and len(fits) > 1:
        raise LoadError(f"{path}: fits {', '.join(fits)}, and the files cannot tell which: say it with --like")
    one, parts = fits[wanted or next(iter(fits))]
    made = Draft(one, path, registry.cards)
    for name, part in parts.items():
        if name not in found.odd:
            made.parts[name] = "whole" if made.whole else _kind(part), path
    made.parts.update((name, ("whole", path)) for name in found.tokenizers)
    return made


def _kind(part: FoundPart) -> Kind:
    return "folder" if part.place.is_dir() else "original" if part.original else "plain"


def flag(part: str) -> str:
    """The option of `instep models add` for a part."""
    return f"--{part.replace('_', '-')}"


def free_id(path: Path, registry: Registry, models: Path) -> str:
    """An id made of the name of the files, with a number behind it where that one is taken."""
    named = re.sub(r"[^a-z0-9._]+", "-", (path.name if path.is_dir() else path.stem).lower()).strip("-._")[:58]
    ids = (f"{named or 'model'}{number}" for number in ("", *(f"-{count}" for count in range(2, 10_000))))
    return next(model for model in ids if not _is_taken(model, registry, models))


def free_folder(model: str, registry: Registry, models: Path) -> Path:
    """The folder of a new model. Raises LoadError: its name is none, or is taken."""
    if not re.fullmatch(ID, model):
        raise LoadError(f'"{model}" cannot be the id of a model: letters, digits, ".", "_", "-"')
    if _is_taken(model, registry, models):
        raise LoadError(f"{models / model}: there is a model of this name already; give another with --id")
    return models / model


def _is_taken(model: str, registry: Registry, models: Path) -> bool:
    return (models / model).exists() or any(model in card.names for card in registry.cards.values())
