"""Identify a user's files: an inventory of their parts, which cards these fit, and what differs where none does.

Only headers are read, and each is checked before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from app.cards.card import Card
from app.cards.catalog import SHIPPED
from app.cards.files import INDEX, PICKLES, read_classes, read_json
from app.cards.folder import ModelFolder, Part
from app.checkpoints.tensors import State, read_names, read_outline, read_torch_zip
from app.errors import CheckpointError
from app.families.authors import Layout, parts_in
from app.families.components import counts, differences, has_weights, outline_of

BESIDES = {
    "AutoencoderKL": ("scaling_factor", "shift_factor"),
    "DiTTransformer2DModel": ("sample_size",),
    "Transformer2DModel": ("sample_size",),
}
"""Keys of configs that distinguish networks of the same shapes."""


@dataclass(frozen=True, slots=True)
class FoundPart:
    """A network in a user's files. place: its folder, or the file that has it, perhaps beside others.

    state: its tensors on the meta device, by their names there. original: how its authors name it; None for diffusers'
    names.
    """

    place: Path
    state: State
    original: Layout | None = None


@dataclass(frozen=True, slots=True)
class CardConfigs:
    """A card, and by name its parts, with the folders of the configs that files are compared with."""

    card: Card
    parts: Mapping[str, Part]

    def network(self, part: str) -> Part | None:
        """The part if it is a network whose config is on this machine."""
        one = self.parts.get(part)
        return one if one and has_weights(one.class_name) and (one.folder / "config.json").is_file() else None

    def differences(self, part: str, found: FoundPart) -> list[str] | None:
        """How a found part differs from this one, a line each; None where it is not even of the same kind."""
        own = self.network(part)
        if own is None:
            return None
        class_name, state = own.class_name, found.state
        if found.original is not None:
            if class_name not in found.original.classes:
                return None
            try:
                state = found.original.read(class_name, found.state)
            except ValueError as error:
                return [str(error)]
        return differences(class_name, own.folder, state) or self._besides(part, found)

    def _besides(self, part: str, found: FoundPart) -> list[str]:
        """Differences that no shape shows: of the configs, or of the positions in a DiT's file."""
        own = read_json(self.parts[part].folder / "config.json")
        theirs: Mapping[str, Any] = {}
        if found.place.is_dir() and (found.place / "config.json").is_file():
            theirs = read_json(found.place / "config.json")
        elif found.original and "pos_embed" in found.state:
            theirs = {"sample_size": isqrt(found.state["pos_embed"].shape[1]) * int(own.get("patch_size", 2))}
        both = [name for name in BESIDES.get(self.parts[part].class_name, ()) if name in own and name in theirs]
        return [f"its {name} is {theirs[name]}, not {own[name]}" for name in both if theirs[name] != own[name]]

    def counts(self, part: str) -> tuple[int, int]:
        """Parameters of a network, and all numbers that it keeps in memory."""
        return counts(self.parts[part].class_name, self.parts[part].folder)

    def missing(self, parts: Iterable[str]) -> list[str]:
        """The card's parts that are not among these."""
        return [part for part in self.parts if part not in set(parts)]


@dataclass
class Inventory:
    """The parts of a user's files. fits: the cards that these fit, each with the parts by its names.

    tokenizers: names of those in a folder. pickled: it is a torch file. nearest: where no card fits, the one that comes
    nearest, the part, and how it differs. odd: parts of a file that this server cannot read, or that are not the first
    fitting card's, and why. others: names in a file that no layout has.
    """

    path: Path
    parts: dict[str, FoundPart]
    tokenizers: tuple[str, ...] = ()
    pickled: bool = False
    fits: list[tuple[CardConfigs, dict[str, FoundPart]]] = field(default_factory=list)
    nearest: tuple[Card, str, list[str]] | None = None
    odd: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def bases(self) -> list[tuple[CardConfigs, dict[str, FoundPart]]]:
        """The fits without cards that were made of another of them; the shipped ones, where there are some."""
        known = {one.card.id for one, _ in self.fits}
        own = [(one, parts) for one, parts in self.fits if one.card.like not in known - {one.card.id}]
        return [fit for fit in own if fit[0].card.id in SHIPPED] or own

    def check(self) -> None:
        """Raises CheckpointError: the network is in a form that this server does not read, or no card fits."""
        if "transformer" in self.odd and "transformer" not in self.parts:
            raise CheckpointError(f"{self.path}: {self.odd['transformer']}")
        if self.fits:
            return
        if self.nearest is None:
            names = next((list(part.state) for part in self.parts.values() if part.state), ["none"])
            first = ", ".join(map(short, names[:3]))
            raise CheckpointError(f"{self.path}: in no layout that is known here; its tensors: {first} ...")
        card, part, found = self.nearest
        more = f", and {len(found) - 1} more differences" if len(found) > 1 else ""
        what = f"the nearest is {card.id}, whose {part} is another: {short(found[0])}{more}"
        raise CheckpointError(f"{self.path}: fits no card; {what}")


def short(text: str) -> str:
    """Text from a file, cut to fit a line."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def identify(path: Path, cards: Mapping[str, Card]) -> Inventory:
    """Compare a diffusers folder, or one file, with every card that has configs. Raises CheckpointError."""
    found = take_inventory(path)
    for card in cards.values():
        if (one := configs_of(card, cards)) and (parts := _match(found, one)):
            found.fits.append((one, parts))
    if "transformer" in found.parts and found.fits and path.is_file():  # a folder's parts have own configs
        one, parts = found.fits[0]
        for name, part in parts.items():
            lines = one.differences(name, part)
            if lines is None:
                found.odd[name] = f"{one.card.id} has no such part"
            elif lines:
                found.odd[name] = lines[0]
    return found


def take_inventory(path: Path) -> Inventory:
    """The networks of a diffusers folder, a part's folder, a safetensors or a torch file. Raises CheckpointError."""
    if path.is_file():
        return _of_torch_file(path) if path.suffix in PICKLES else _of_safetensors(path)
    if (path / INDEX).is_file():
        classes = {name: kind for name, kind in read_classes(path / INDEX).items() if (path / name).is_dir()}
        parts = {
            name: FoundPart(path / name, read_outline(path / name)) for name in classes if has_weights(classes[name])
        }
        return Inventory(path, parts, tuple(name for name in classes if name not in parts))
    if (path / "config.json").is_file():
        return Inventory(path, {"": FoundPart(path, read_outline(path))})
    raise CheckpointError(f"{path}: neither a safetensors file nor a folder with {INDEX}")


def _of_torch_file(file: Path) -> Inventory:
    state = {key: torch.empty_like(value, device="meta") for key, value in read_torch_zip(file).items()}
    named = {part: FoundPart(file, state, original) for part, original in parts_in(state).items()}
    return Inventory(file, named or {"": FoundPart(file, state)}, pickled=True)


def _of_safetensors(file: Path) -> Inventory:
    """The parts of one file; one by diffusers' or transformers' names has no name yet."""
    names = read_names(file)
    originals = parts_in(names)
    if not originals:
        return Inventory(file, {"": FoundPart(file, read_outline(file))})
    prefixes = tuple(one.prefix for one in originals.values())
    found = Inventory(file, {}, others=sorted(name for name in names if not name.startswith(prefixes)))
    for part, one in originals.items():
        try:
            found.parts[part] = FoundPart(file, read_outline(file, one.prefix), one)
        except CheckpointError as error:  # a number format, of which other parts know nothing
            found.odd[part], trouble = error.message.removeprefix(f"{file}: "), error
    if not found.parts:
        raise trouble
    return found


def configs_of(card: Card, cards: Mapping[str, Card]) -> CardConfigs | None:
    """The card with the configs of its parts; None where its network's is not here, or is another card's."""
    if "transformer" in card.components:
        return None
    try:
        parts = {part.name: part for part in ModelFolder(card, cards).beside().parts()}
    except CheckpointError:
        return None
    one = CardConfigs(card, parts)
    return one if one.network("transformer") else None


def _match(found: Inventory, one: CardConfigs) -> dict[str, FoundPart]:
    """The found parts by the card's names; empty where its network is another, or without one, where any part is."""
    if network := found.parts.get("transformer"):
        return found.parts if _compare(found, one, "transformer", network) == [] else {}
    named: dict[str, FoundPart] = {}
    for own, part in found.parts.items():
        names = [name for name in sorted(one.parts, key=lambda name: name != own) if name not in named]
        fitting = [name for name in names if _compare(found, one, name, part) == []]
        if not fitting:
            return {}
        named[fitting[0]] = part
    return named


def _compare(found: Inventory, one: CardConfigs, name: str, part: FoundPart) -> list[str] | None:
    """The differences; the nearest card, of those with a tensor's name in common, is noted in the inventory."""
    lines = one.differences(name, part)
    if lines and (found.nearest is None or len(lines) < len(found.nearest[2])):
        own = outline_of(one.parts[name].class_name, one.parts[name].folder)
        if part.original is not None or own.keys() & part.state.keys():
            found.nearest = one.card, name, lines
    return lines
