"""Adapters: the LoRA files of a folder and the models that each fits, and reading one for a model's networks.

`python -m app.checkpoints.adapters` finds the first for the front, which never imports torch: a pickle of the folder
and the cards by id goes in, and a list of Adapters as JSON comes out.
"""

import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from torch import nn

from app.cards.adapters import Adapter, Fit
from app.cards.card import ID, Card
from app.cards.files import PICKLES, explained, read_toml, refuse_foreign
from app.cards.folder import ModelFolder
from app.checkpoints.tensors import State, read_metadata, read_outline, read_states
from app.errors import CheckpointError, InstepError, first_problem, plain
from app.families.components import network_of
from app.families.lora import Matched, match

NOTES_LIMIT = 2**16
"""Bytes of the TOML beside a file."""


def survey(place: Path, cards: Mapping[str, Card], whole: bool = False) -> list[Adapter]:
    """Every LoRA file of a folder, or one file; also one that fits no model, which has a `problem`. By their names.

    whole: read all numbers, not only headers. Raises CheckpointError: it is not there, or cannot be read.
    """
    with explained(place):
        files = [place] if place.is_file() else sorted(place.iterdir())
    networks = {card.id: found for card in cards.values() if (found := networks_of(card, cards))}
    wanted = (file for file in files if file == place or file.suffix in (".safetensors", *PICKLES))
    return [_surveyed(file, networks, whole) for file in wanted]


def read_adapter(file: Path, networks: Mapping[str, nn.Module]) -> Matched:
    """The pairs of a file for the networks of a model, by the names of their parts.

    Raises CheckpointError naming the file: as `read_states`, or it is no LoRA of this model, by `match`.
    """
    state, metadata = _read(file, whole=True)
    with explained(file, ValueError):
        return match(state, networks, metadata)


def networks_of(card: Card, cards: Mapping[str, Card]) -> dict[str, nn.Module]:
    """The networks of a card that adapters may change, without weights; none where their configs are not here."""
    for folder in (ModelFolder(card, cards), ModelFolder(card, cards).beside()):
        try:
            parts = [part for part in folder.parts() if may_change(card, part.name)]
            return {part.name: network_of(part.class_name, part.folder) for part in parts}
        except (InstepError, OSError, ValueError, RuntimeError):
            continue
    return {}


def may_change(card: Card, part: str) -> bool:
    """Whether adapters may change this part of a card."""
    return part == card.network or part.startswith("text_encoder")


def _read(file: Path, whole: bool) -> tuple[State, dict[str, str]]:
    refuse_foreign(file)  # a folder too
    shards = read_states(file) if whole else [read_outline(file)]
    return {key: value for shard in shards for key, value in shard.items()}, read_metadata(file)


def _surveyed(file: Path, networks: Mapping[str, Mapping[str, nn.Module]], whole: bool) -> Adapter:
    name = file.stem if file.suffix == ".safetensors" else file.name
    made = Adapter(name=plain(name), file=file.parent / plain(file.name), stamp=())
    fits: dict[str, Fit] = {}
    reasons: dict[str, list[str]] = {}
    try:
        if not re.fullmatch(ID, name):
            raise CheckpointError(f'{file}: "{name}" cannot be a name: letters, digits, ".", "_", "-"')
        state, metadata = _read(file, whole)
        made = _with_notes(made)
        for model, parts in networks.items():
            try:
                fits[model] = _fit(state, match(state, parts, metadata))
            except ValueError as error:
                reasons.setdefault(str(error), []).append(model)
        if not all(fit.unmatched for fit in fits.values()):  # where one model takes all, another may take the less part
            fits = {model: fit for model, fit in fits.items() if 2 * len(fit.unmatched) <= len(state)}
        each = [f"{why} ({', '.join(models)})" if len(reasons) > 1 else why for why, models in reasons.items()]
        problem = "" if fits else f"{file}: {'; '.join(each) or 'no model is here'}"
    except Exception as error:  # whatever a spoiled file does to a library, the others go on
        why = f"{file}: cannot be read ({type(error).__name__})"
        problem = error.message if isinstance(error, InstepError) else plain(why)
    return made.model_copy(update={"fits": fits, "problem": problem})


def _with_notes(adapter: Adapter) -> Adapter:
    """The adapter with its file's stamp and what the TOML beside it says. Raises CheckpointError naming that."""
    stat, file = adapter.file.stat(), adapter.file.with_suffix(".toml")
    stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    try:
        notes = read_toml(file, limit=NOTES_LIMIT) if os.path.lexists(file) else {}
        if unknown := notes.keys() - {"description", "trigger_words"}:
            raise ValueError(f"{min(unknown):.80}: unknown field")
        return Adapter(**{**adapter.model_dump(), "stamp": stamp, **notes})
    except (OSError, ValueError, RecursionError) as error:
        place, why = first_problem(error.errors()) if isinstance(error, ValidationError) else ((), str(error))
        raise CheckpointError(": ".join((str(file), *place[:1], why))) from error


def _fit(state: State, found: Matched) -> Fit:
    lost = set(found.unmatched)
    return Fit(
        rank=max(len(down) for down, _ in found.pairs.values()),
        modules=len(found.pairs),
        parts=tuple(sorted({part for part, _ in found.pairs})),
        bytes=sum(value.nbytes for key, value in state.items() if key not in lost),
        unmatched=tuple(map(plain, found.unmatched)),
    )


if __name__ == "__main__":
    found = survey(*pickle.load(sys.stdin.buffer))
    sys.stdout.buffer.write(TypeAdapter(list[Adapter]).dump_json(found))
