"""Makings: what the card of a user's own files is made of, and its folder: the card, links, and copies of configs.

Knows nothing of how the makings were found (add.py).
"""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from app.card import INDEX, Card, read_cards, to_toml
from app.errors import NotDownloaded

if TYPE_CHECKING:
    from app.pool.identify import Shipped

OWN = ("id", "aliases", "source", "components", "files", "bytes", "gated")
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
    def parts(self) -> set[str]:
        return {*self.files, *self.plain, *self.links, *self.rest, *self.inside}


def write(folder: Path, model: str, makings: Makings) -> None:
    """The card's folder, the card last; nothing stays of one that could not be written or is not right."""
    folder.mkdir()
    try:
        like = makings.like
        if makings.source is None:
            _write_layout(folder, makings)
        raw = tomllib.loads((like.card.folder / "card.toml").read_text(encoding="utf-8"))
        card = {
            "id": model,
            **{name: value for name, value in raw.items() if name not in OWN},
            "source": {"path": str(makings.source or ".")},
            **({"components": makings.rest} if makings.rest else {}),
            **({"files": {part: str(file) for part, file in makings.files.items()}} if makings.files else {}),
        }
        lines = [f"{name} = {to_toml(value)}" for name, value in card.items()]
        (folder / "card.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        prove(model, read_cards(folder.parent))
    except BaseException:
        shutil.rmtree(folder)
        raise


def prove(model: str, cards: dict[str, Card]) -> None:
    """Raises LoadError when the model could not be built of configs and headers; other cards' parts are believed."""
    import torch

    from app.pool.component import Component
    from app.pool.layout import read_parts

    try:
        parts = read_parts(cards[model], cards)
    except NotDownloaded:
        return
    for part in parts:
        if part.name in cards[model].components:
            continue
        Component(part, torch.device("cpu"), torch.bfloat16)


def _write_layout(folder: Path, makings: Makings) -> None:
    """model_index.json, the configs of parts in files, and links to the folders of others."""
    like = makings.like
    index = json.loads((like.folder / INDEX).read_text(encoding="utf-8"))
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
