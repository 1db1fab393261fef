"""Contents: the tensors of a part by the network's names, from its folder or from a file in the authors' own layout.

Knows nothing of networks, cards or devices.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path

from app.cards.files import read_json
from app.cards.folder import Part
from app.checkpoints.tensors import State, read_names, read_outline, read_states
from app.errors import CheckpointError
from app.families.authors import Layout, find_part

_TOLD = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""What a config.json says of how it was written, besides what begins with an underscore."""


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
    """Another one when the files of its weights have changed: which they are, their sizes and times. Reads none."""
    places = [part.weights, *sorted(part.weights.glob("*"))]
    stats = [(place.name, place.stat()) for place in places if place.is_file()]
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)


def part_identity(part: Part) -> tuple[Hashable, ...]:
    """What two parts have in common that are one: a folder; or a file, what of it, and what its config says."""
    if part.file is None:
        return (part.folder,)
    config = read_json(part.folder / "config.json")
    said = {key: value for key, value in config.items() if key[:1] != "_" and key not in _TOLD}
    return part.file, _held(part, part.file).prefix, part.class_name, repr(sorted(said.items()))


def _held(part: Part, file: Path) -> Layout:
    try:
        return find_part(part.name, part.class_name, read_names(file))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _named(part: Part, held: Layout, state: State) -> State:
    try:
        return held.read(part.class_name, state)
    except ValueError as error:
        raise CheckpointError(f"{part.file}: {error}") from error
