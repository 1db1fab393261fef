"""The parts of a card: which its folder names, the tensors of each by the network's names, and the modules they become.

A part's weights are in its folder, or in a file of its authors' own layout.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from app.cards.card import Card
from app.cards.files import INDEX, explained, read_json
from app.cards.folder import ModelFolder, Part, changes, check_schedule, schedule_of
from app.checkpoints.tensors import State, read_names, read_outline, read_states
from app.errors import CheckpointError, InstepError, NotDownloaded
from app.families import FAMILIES
from app.families.authors import Layout, find_part
from app.families.base import Family
from app.families.components import blank_network, build_tokenizer, fill_network, has_weights
from app.samplers.table import compile_table

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
    if missing := [name for name in required if name not in {part.name for part in parts}]:
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
    not whole, or have no such part (the message names those they have), or have names that no layout knows."""
    original = _original(part)
    outline = read_outline(part.weights, original.prefix if original else "")
    return _named(part, original, outline)


def part_states(part: Part) -> Iterator[State]:
    """The tensors, one shard after another; they may be maps of the files. Raises CheckpointError."""
    original = _original(part)
    for state in read_states(part.weights, original.prefix if original else ""):
        yield _named(part, original, state)


def _original(part: Part) -> Layout | None:
    """How the authors' file names the part; None for one in a folder."""
    if part.file is None:
        return None
    with explained(part.file, ValueError):
        return find_part(part.name, part.class_name, read_names(part.file))


def _named(part: Part, original: Layout | None, state: State) -> State:
    if original is None:
        return state
    with explained(part.weights, ValueError):
        return original.read(part.class_name, state)


def part_stamp(part: Part) -> tuple[Hashable, ...]:
    """The names, sizes and times of the files of its weights: another stamp means changed files. Reads no content."""
    places = [part.weights, *sorted(part.weights.glob("*"))]
    stats = [(place.name, place.stat()) for place in places if place.is_file()]
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def part_identity(part: Part) -> tuple[Hashable, ...]:
    """Equal for parts that are the same object: the folder; or the file, the place in it, and the config's content."""
    original = _original(part)
    if original is None:
        return (part.folder,)
    config = read_json(part.folder / "config.json")
    facts = {key: value for key, value in config.items() if key[:1] != "_" and key not in _WRITER}
    return part.file, original.prefix, part.class_name, repr(sorted(facts.items()))


def part_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The number format of a part of a model in `dtype`, which is never float16 (SDXL's VAE overflows in it): a VAE on
    the CPU is float32 always."""
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
            fill_network(built[part.name], part.weights, part_states(part), device, own)
    return built


def build_family(card: Card, parts: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Family:
    """The family of built parts. Raises CheckpointError: they do not fit each other or the card."""
    with torch.inference_mode():
        family: Family = FAMILIES[card.family](card, dict(parts), device, dtype)
    return family


def prove(card: Card, cards: Mapping[str, Card]) -> None:
    """Build the model from configs and headers alone; without the parts of other cards where these are not downloaded.

    Raises LoadError: it cannot be built, CardError: its defaults do not fit.
    """
    check_defaults(card)
    try:
        parts, complete = read_parts(card, cards), True
    except NotDownloaded:
        parts, complete = ModelFolder(card, cards).own(), False
        check_classes(card, parts)
    built = {part.name: blank_part(part) for part in parts}
    if complete:
        build_family(card, built, torch.device("cpu"), torch.bfloat16)


def check_card(card: Card, cards: Mapping[str, Card]) -> tuple[str, str]:
    """Load the model on the CPU: "ok", "absent" (not downloaded) or "broken", and a detail."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    try:
        check_defaults(card)
        parts = build_parts(card, cards, device, dtype)
        with torch.inference_mode():
            build_family(card, parts, device, dtype).prepare()
    except NotDownloaded as error:
        return "absent", error.message
    except InstepError as error:
        return "broken", error.message
    except Exception as error:
        return "broken", f"cannot be loaded ({type(error).__name__})"
    return "ok", f"{len(parts)} parts{_overruled(card, ModelFolder(card, cards).path)}"


def check_defaults(card: Card) -> None:
    """Raises InstepError when the card's own defaults make no table of coefficients."""
    compile_table(card.schedule, card.defaults.sampler, card.defaults.num_inference_steps, tokens=256)


def _overruled(card: Card, folder: Path) -> str:
    """The end of a line: how the folder's scheduler_config.json differs from the card, which is what counts."""
    try:
        found = changes(card.schedule, schedule_of(folder, card.schedule.model_dump()))
    except CheckpointError as error:
        return f"; the card does not follow {error.message}"
    return f"; its scheduler_config.json differs from the card: {', '.join(found)}" if found else ""
