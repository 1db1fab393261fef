"""Identify: which shipped card fits files that a user has, and how far the nearest is when none does.

Knows nothing of what will be done with them. Only headers are read, and each is checked before it is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from app.cards.card import Card
from app.cards.files import INDEX, PICKLES, read_classes, read_json
from app.checkpoints.tensors import read_names, read_outline, read_torch_zip
from app.errors import CheckpointError
from app.families import FAMILIES
from app.families.components import State, has_weights
from app.families.differences import counts, differences, outline_of
from app.families.originals import Held, parts_in

BESIDES = {
    "AutoencoderKL": ("scaling_factor", "shift_factor"),
    "DiTTransformer2DModel": ("sample_size",),
    "Transformer2DModel": ("sample_size",),
}
"""Fields of configs that tell networks of the same shapes apart."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A network that the files hold. place: a part's folder, or the file that has it beside others.

    state: its own tensors, by the names that stand there. held: how its authors name it; None for diffusers' names.
    """

    place: Path
    state: State
    held: Held | None = None

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(value.numel() * value.dtype.itemsize for value in self.state.values())

    @property
    def formats(self) -> str:
        """The number formats that it is stored in."""
        return ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in self.state.values()}))


@dataclass(frozen=True, slots=True)
class Shipped:
    """A card with the configs that its networks are compared by: those beside it, or where its files are."""

    card: Card
    folder: Path
    classes: Mapping[str, str]

    def differences(self, part: str, piece: Piece) -> list[str] | None:
        """How a piece differs from this part, a line each; None where it is not even of the same kind."""
        class_name = self.classes.get(part, "")
        if not has_weights(class_name):
            return None
        state = piece.state
        if piece.held is not None:
            if class_name not in piece.held.layout.classes:
                return None
            try:
                state = piece.held.read(class_name, piece.state)
            except ValueError as error:
                return [str(error)]
        return differences(class_name, self.folder / part, state) or self._besides(part, piece)

    def _besides(self, part: str, piece: Piece) -> list[str]:
        """Differences that no shape of the network shows: what a config says, and the places of a DiT's file."""
        own = read_json(self.folder / part / "config.json")
        theirs: Mapping[str, Any] = {}
        if piece.place.is_dir() and (piece.place / "config.json").is_file():
            theirs = read_json(piece.place / "config.json")
        elif piece.held and piece.held.layout.family == "dit" and "pos_embed" in piece.state:
            theirs = {"sample_size": isqrt(piece.state["pos_embed"].shape[1]) * int(own.get("patch_size", 2))}
        said = [name for name in BESIDES.get(self.classes[part], ()) if name in own and name in theirs]
        return [f"its {name} is {theirs[name]}, not {own[name]}" for name in said if theirs[name] != own[name]]

    def counts(self, part: str) -> tuple[int, int]:
        """Parameters of a network, and all numbers that it keeps in memory."""
        return counts(self.classes[part], self.folder / part)

    def names(self, part: str) -> set[str]:
        """Of a network's tensors."""
        return set(outline_of(self.classes[part], self.folder / part))

    def missing(self, parts: Iterable[str]) -> list[str]:
        """What of this card's parts is not among these."""
        return [part for part in self.classes if part not in set(parts)]


@dataclass
class Report:
    """What was found. fits: cards whose network, or where there is none whose parts, these are, with the part's names.

    tokenizers: those that are there. pickled: it is a torch file. nearest: the card that comes nearest where none fits,
    the part, and what keeps it from that. odd: parts of a file that this server cannot read, or that are not the first
    fitting card's, and why. others: names in a file that no layout has.
    """

    path: Path
    pieces: dict[str, Piece]
    tokenizers: tuple[str, ...] = ()
    pickled: bool = False
    fits: list[tuple[Shipped, dict[str, Piece]]] = field(default_factory=list)
    nearest: tuple[Card, str, list[str]] | None = None
    odd: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def identify(path: Path, cards: Mapping[str, Card]) -> Report:
    """Compare a diffusers folder, or one safetensors file, with every card that has configs. Raises CheckpointError."""
    report = look(path)
    for one in (one for card in cards.values() if (one := shipped_of(card)) is not None):
        if "transformer" in report.pieces:
            found = _near(report, one, "transformer", report.pieces["transformer"])
            report.fits += [(one, report.pieces)] if found == [] else []
        elif named := _by_looks(report, one):
            report.fits.append((one, named))
    if "transformer" in report.pieces and report.fits and path.is_file():
        _look_beside(report)  # the parts of a folder have configs of their own
    return report


def look(path: Path) -> Report:
    """The networks of a diffusers folder, a part's folder, a safetensors or a torch file. Raises CheckpointError."""
    if path.is_file():
        return _look_in(path)
    if (path / INDEX).is_file():
        classes = {name: kind for name, kind in read_classes(path / INDEX).items() if (path / name).is_dir()}
        pieces = {name: Piece(path / name, read_outline(path / name)) for name in classes if has_weights(classes[name])}
        return Report(path, pieces, tuple(name for name in classes if name not in pieces))
    if (path / "config.json").is_file():
        return Report(path, {"": Piece(path, read_outline(path))})
    raise CheckpointError(f"{path}: neither a safetensors file nor a folder with {INDEX}")


def _look_in(file: Path) -> Report:
    """The parts of one file; one by diffusers' or transformers' names has no name yet."""
    if file.suffix in PICKLES:
        state = {key: torch.empty_like(value, device="meta") for key, value in read_torch_zip(file).items()}
        named = {part: Piece(file, state, one) for part, one in parts_in(state).items()}
        return Report(file, named or {"": Piece(file, state)}, pickled=True)
    names = read_names(file)
    held = parts_in(names)
    if not held:
        return Report(file, {"": Piece(file, read_outline(file))})
    prefixes = tuple(one.prefix for one in held.values())
    report, error = Report(file, {}, others=sorted(name for name in names if not name.startswith(prefixes))), None
    for part, one in held.items():
        try:
            report.pieces[part] = Piece(file, read_outline(file, one.prefix), one)
        except CheckpointError as trouble:  # a number format, of which other parts know nothing
            report.odd[part], error = trouble.message.removeprefix(f"{file}: "), trouble
    if error is not None and not report.pieces:
        raise error
    return report


def shipped_of(card: Card) -> Shipped | None:
    """The card with its configs; None where it has none on this machine."""
    here = [card.folder] if card.source.path is None else [card.folder, card.folder / card.source.path]
    for folder in here:
        if (folder / INDEX).is_file() and (folder / "transformer" / "config.json").is_file():
            return Shipped(card, folder, read_classes(folder / INDEX))
    return None


def phases(one: Shipped, parts: Iterable[str], bytes_each: Mapping[str, int]) -> dict[str, int]:
    """Bytes of memory that these parts take in each phase. bytes_each: of one number of each part."""
    there = {part for part in parts if has_weights(one.classes.get(part, ""))}
    named = FAMILIES[one.card.family].phases
    return {
        phase: sum(one.counts(part)[1] * bytes_each[part] for part in names if part in there)
        for phase, names in named.items()
    }


def _by_looks(report: Report, one: Shipped) -> dict[str, Piece]:
    """Pieces without a network: which of the card's parts they are; empty unless all of them are one."""
    named: dict[str, Piece] = {}
    for part, piece in report.pieces.items():
        names = [part, *one.classes] if part in one.classes else list(one.classes)
        fitting = [name for name in names if name not in named and _near(report, one, name, piece) == []]
        if not fitting:
            return {}
        named[fitting[0]] = piece
    return named


def _near(report: Report, one: Shipped, part: str, piece: Piece) -> list[str] | None:
    """The differences, and the nearest card so far noted down: one that has a name in common with it."""
    found = one.differences(part, piece)
    alike = found and (piece.held is not None or one.names(part) & piece.state.keys())
    if found and alike and (report.nearest is None or len(found) < len(report.nearest[2])):
        report.nearest = one.card, part, found
    return found


def _look_beside(report: Report) -> None:
    one, pieces = report.fits[0]
    for part, piece in pieces.items():
        found = one.differences(part, piece)
        if found is None:
            report.odd[part] = f"{one.card.id} has no such part"
        elif found:
            report.odd[part] = found[0]
