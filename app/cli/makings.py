"""Makings: what the card of a user's own files is made of, and its folder: the card, links, and copies of configs.

Knows nothing of how the makings were found (add.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cards.card import Card, read_card
from app.cards.files import INDEX, read_json, read_toml, to_toml
from app.cards.folder import ModelFolder
from app.cards.noise import schedule_of
from app.cli.models import check_facts
from app.errors import LoadError, NotDownloaded

if TYPE_CHECKING:
    from app.checkpoints.identify import Shipped

OWN = ("id", "like", "aliases", "source", "components", "files", "bytes", "gated")
"""Fields of a card that are not taken from the one that it is like."""


@dataclass
class Makings:
    """What a card is made of. files: part -> file that has it by its authors' names; plain: by diffusers' names.

    links: part -> its folder. rest: part -> another card's. source: a whole diffusers folder, if that was given, and
    inside: its parts.
    """

    like: Shipped
    files: dict[str, Path] = field(default_factory=dict)
    plain: dict[str, Path] = field(default_factory=dict)
    links: dict[str, Path] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)
    source: Path | None = None
    inside: set[str] = field(default_factory=set)

    @property
    def schedule(self) -> dict[str, Any]:
        """The `schedule` of the card: what the files say of their own, and the rest of the one that they are like.

        Raises CheckpointError: they say what no card can.
        """
        raw = read_toml(self.like.card.folder / "card.toml")["schedule"]
        return schedule_of(self.source, raw) if self.source else raw

    @property
    def place(self) -> Path:
        """What to name in an error."""
        return self.source or next(iter((*self.files.values(), *self.plain.values())))

    @property
    def parts(self) -> set[str]:
        return {*self.files, *self.plain, *self.links, *self.rest, *self.inside}


def write(folder: Path, makings: Makings, cards: Mapping[str, Card]) -> None:
    """The card's folder, named as its id; nothing stays of one that could not be written or is not right.

    Raises CardError, LoadError: no model can be built of it.
    """
    folder.mkdir()
    try:
        if makings.source is None:
            _write_layout(folder, makings)
        raw = read_toml(makings.like.card.folder / "card.toml")
        card = {
            "id": folder.name,
            "like": makings.like.card.id,
            **{name: value for name, value in raw.items() if name not in OWN},
            "schedule": makings.schedule,
            "source": {"path": str(makings.source or ".")},
            **({"components": makings.rest} if makings.rest else {}),
            **({"files": {part: str(file) for part, file in makings.files.items()}} if makings.files else {}),
        }
        lines = [f"{name} = {to_toml(value)}" for name, value in card.items()]
        (folder / "card.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        prove(read_card(folder / "card.toml"), cards)
    except LoadError as error:
        shutil.rmtree(folder)
        raise type(error)(error.message.replace(str(folder / "card.toml"), str(makings.place))) from error
    except BaseException:
        shutil.rmtree(folder)
        raise


def prove(card: Card, cards: Mapping[str, Card]) -> None:
    """Raises LoadError when the model cannot be built of configs and headers, CardError when its defaults do not fit.

    Where other cards give parts that are not here, its own alone are looked at.
    """
    # NOTE: imported late: torch and the model libraries take seconds.
    import torch

    from app.checkpoints.parts import blank_part, build_family, check_classes, read_parts

    check_facts(card)
    device, dtype = torch.device("cpu"), torch.bfloat16
    folder = ModelFolder(card, {**cards, card.id: card})
    check_classes(card, folder.own())
    own = {part.name: blank_part(part) for part in folder.own()}
    try:
        parts = read_parts(card, cards)
    except NotDownloaded:
        return
    shared = {part.name: blank_part(part) for part in parts if part.name not in own}
    build_family(card, {**own, **shared}, device, dtype)


def _write_layout(folder: Path, makings: Makings) -> None:
    """model_index.json, the configs of parts in files, and links to the folders of others."""
    like = makings.like
    index = read_json(like.folder / INDEX)
    absent = like.missing(makings.parts - makings.rest.keys())
    (folder / INDEX).write_text(json.dumps({k: v for k, v in index.items() if k not in absent}, indent=2) + "\n")
    for part in (*makings.files, *makings.plain, "scheduler"):
        for file in sorted((like.folder / part).glob("*config.json")):
            (folder / part).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / part / file.name)
    for part, place in makings.links.items():
        (folder / part).symlink_to(place)
    for part, file in makings.plain.items():
        (folder / part / "model.safetensors").symlink_to(file)
