"""The parts of a card: which its folder names, the tensors of each by the network's names, and the modules they become.

A part's weights are in its folder, or in a file of its authors' own layout.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from app.cards.card import Card
from app.cards.files import INDEX, read_json
from app.cards.folder import ModelFolder, Part
from app.cards.noise import check_schedule
from app.checkpoints.tensors import State, read_names, read_outline, read_states
from app.errors import CheckpointError
from app.families import FAMILIES
from app.families.base import Family
from app.families.components import blank_network, build_tokenizer, fill_network, has_weights
from app.families.originals import Held, find_part

_WRITER = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of a config.json about how it was written, besides those that begin with an underscore."""


def read_parts(card: Card, cards: Mapping[str, Card]) -> list[Part]:
    """The parts to build for a card: its own model_index.json's, with those of `card.components` in their place.

    Raises CheckpointError: a missing or corrupt index, a class outside the allowlist, a part the family has no use
    for or misses, a schedule that clips, files that are not here; NotDownloaded where a download brings them.
    """
    folder, required = ModelFolder(card, cards), FAMILIES[card.family].required
    parts = folder.parts()
    check_schedule(folder.path)
    check_classes(card, parts)
    missing = [name for name in required if name not in {part.name for part in parts}]
    if missing:
        raise CheckpointError(f"{folder.path / INDEX}: {missing[0]}: missing, and {card.family} needs it")
    return folder.check()


def check_classes(card: Card, parts: Iterable[Part]) -> None:
    """Raises CheckpointError at a part that the card's family has no use for, or of a class that it does not load."""
    for part in parts:
        if part.class_name not in FAMILIES[card.family].parts.get(part.name, ()):
            raise CheckpointError(
                f'{card.id}: {part.name}: "{part.class_name}" is not a class that {card.family} loads'
            )


def part_outline(part: Part) -> State:
    """Names, shapes and number formats, on the meta device, from headers alone. Raises CheckpointError: the files are
    not whole, or hold no such part (then with the parts they hold), or names of it that nobody knows."""
    if part.file is None:
        return read_outline(part.folder)
    held = _held(part, part.file)
    return _named(part, held, read_outline(part.file, held.prefix))


def part_states(part: Part) -> Iterator[State]:
    """The tensors, one shard after another; they may be maps of the files. Raises CheckpointError."""
    if part.file is None:
        yield from read_states(part.folder)
        return
    held = _held(part, part.file)
    for state in read_states(part.file, held.prefix):
        yield _named(part, held, state)


def part_stamp(part: Part) -> tuple[Hashable, ...]:
    """The names, sizes and times of the files of its weights: another stamp means changed files. Reads no content."""
    places = [part.weights, *sorted(part.weights.glob("*"))]
    stats = [(place.name, place.stat()) for place in places if place.is_file()]
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def part_identity(part: Part) -> tuple[Hashable, ...]:
    """Equal for parts that are the same object: the folder; or the file, the place in it, and the config's content."""
    if part.file is None:
        return (part.folder,)
    config = read_json(part.folder / "config.json")
    facts = {key: value for key, value in config.items() if key[:1] != "_" and key not in _WRITER}
    return part.file, _held(part, part.file).prefix, part.class_name, repr(sorted(facts.items()))


def part_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The number format of a part of a model in `dtype`: a VAE on the CPU is float32 always."""
    return torch.float32 if name == "vae" and device.type == "cpu" else dtype


def blank_part(part: Part) -> Any:
    """A network without its weights, from config and headers alone, or a tokenizer. Raises CheckpointError."""
    if not has_weights(part.class_name):
        return build_tokenizer(part.class_name, part.folder)
    return blank_network(part.class_name, part.folder, part_outline(part), part.file)


def build_parts(card: Card, cards: Mapping[str, Card], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Every part of the card on the device, by its name. Raises CheckpointError."""
    built = {}
    for part in read_parts(card, cards):
        built[part.name] = blank_part(part)
        if has_weights(part.class_name):
            own = part_dtype(part.name, device, dtype)
            fill_network(built[part.name], part.class_name, part.weights, part_states(part), device, own)
    return built


def build_family(card: Card, parts: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Family:
    """The family of built parts. Raises CheckpointError: they do not fit each other or the card."""
    with torch.inference_mode():
        family: Family = FAMILIES[card.family](card, dict(parts), device, dtype)
    return family


def _held(part: Part, file: Path) -> Held:
    try:
        return find_part(part.name, part.class_name, read_names(file))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _named(part: Part, held: Held, state: State) -> State:
    try:
        return held.read(part.class_name, state)
    except ValueError as error:
        raise CheckpointError(f"{part.file}: {error}") from error
