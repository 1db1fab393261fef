"""The model that is measured: a card with its files, or with random weights of the same size where it has none."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from app.cards.card import Card, read_card, read_cards
from app.cards.catalog import Registry
from app.cards.files import INDEX, to_toml
from app.cards.folder import TOKENIZERS, ModelFolder, Part
from app.engine.engine import Engine
from app.errors import CheckpointError, LoadError
from app.families import FAMILIES
from app.families.base import Family
from app.families.components import has_weights, outline_of
from app.pool.pool import Pool
from app.report import Report
from app.settings import Settings
from app.worker import plan
from app.worker.process import build, resolve_dtype

DEVIATION = 0.02
"""Of every random weight: what transformers are initialised with, so that outputs stay finite at any depth."""

SHARD = 2 << 30
"""Most bytes that are made before they are written, but for a larger tensor."""


@dataclass(frozen=True)
class Subject:
    """A loaded model: its card, its family with all weights, and an engine that the caller ticks.

    reports: those of the engine, in order.
    """

    settings: Settings
    card: Card
    family: Family
    pool: Pool
    engine: Engine
    reports: list[Report]


@contextmanager
def loaded(settings: Settings, model: str | None, *, random_weights: bool = False) -> Iterator[Subject]:
    """Load the card of this name, and free the memory at the end. Raises InstepError: no such card, or no files."""
    with chosen(settings, model, random_weights=random_weights) as (settings, card):
        cards = {card.id: card} if random_weights else dict(read_cards(settings.models, settings.alias))
        reports: list[Report] = []
        pool, engine = build(settings, cards, plan.devices(settings.devices)[0], reports.append)
        try:
            yield Subject(settings, card, _load(pool, card), pool, engine, reports)
        finally:
            pool.close()


@contextmanager
def chosen(settings: Settings, model: str | None, *, random_weights: bool) -> Iterator[tuple[Settings, Card]]:
    """Find a card; with random weights, made for this context, settings and card are those of a folder of its own.

    Raises ModelNotFound, and CheckpointError and OSError as `write_random`.
    """
    cards = read_cards(settings.models, settings.alias)
    card = Registry(cards, settings).find(model)
    if not random_weights:
        yield settings, card
        return
    with tempfile.TemporaryDirectory(prefix="instep-bench-") as folder:
        dtype = resolve_dtype(settings, plan.devices(settings.devices)[0])
        made = write_random(card, cards, Path(folder), dtype)
        yield settings.model_copy(update={"models": Path(folder)}), made


def _load(pool: Pool, card: Card) -> Family:
    """Wait until all parts of the family are on the device."""
    pool.want(card.id)
    while not all(pool.resident(card.id, phase) for phase in ("encode", "denoise", "decode")):
        if error := pool.failure(card.id):
            raise error
        if pool.family(card.id) is not None and not pool.fits(card.id):
            raise LoadError(
                f"{card.id}: its parts do not fit the device together (INSTEP_DEVICE_MEMORY)",
                code="insufficient_gpu_memory",
            )
        time.sleep(0.01)
    family = pool.family(card.id)
    if family is None:
        raise CheckpointError(f"{card.id}: gone while it loaded")
    return family


def write_random(card: Card, cards: Mapping[str, Card], folder: Path, dtype: torch.dtype) -> Card:
    """Write the card's model with random weights under `folder`/<id>, an ordinary model folder, and return its card.

    Sizes are those of the configs beside the card. A text encoder without a tokenizer beside it is left out: its
    embeddings are then zeros. Raises CheckpointError: no model_index.json or config.json there; OSError: no room.
    """
    made = folder / card.id
    made.mkdir(parents=True)
    parts = _parts(card, cards)
    for name, part in parts.items():
        shutil.copytree(part.folder, made / name, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.pt"))
        if has_weights(part.class_name):
            _write(made / name, part.class_name, dtype)
    own = ModelFolder(card, cards).beside().index().items()
    index = {key: [None, None] if key not in parts and isinstance(value, list) else value for key, value in own}
    (made / INDEX).write_text(json.dumps(index), encoding="utf-8")
    facts = card.model_dump(
        mode="json", exclude_none=True, exclude_defaults=True, exclude={"folder", "labels", "components", "files"}
    )
    lines = [f"{key} = {to_toml(value)}" for key, value in {**facts, "source": {"path": "."}}.items()]
    (made / "card.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_card(made / "card.toml")


def _parts(card: Card, cards: Mapping[str, Card]) -> dict[str, Part]:
    """The parts by name, as if every card's files stood beside it, less text encoders that have no tokenizer."""
    try:
        found = ModelFolder(card, cards).beside().parts()
    except CheckpointError as error:
        raise CheckpointError(f"{card.id}: random weights need the configs beside the card: {error.message}") from error
    parts = {part.name: part for part in found if part.name in FAMILIES[card.family].parts}
    for encoder in [name for name in parts if name.startswith("text_encoder")]:
        tokenizer = parts.get(encoder.replace("text_encoder", "tokenizer"))
        if tokenizer is None or not _has_files(tokenizer):
            del parts[encoder]
            parts.pop(encoder.replace("text_encoder", "tokenizer"), None)
    return parts


def _has_files(tokenizer: Part) -> bool:
    choices = TOKENIZERS.get(tokenizer.class_name, ())
    return any(all((tokenizer.folder / name).is_file() for name in names) for names in choices)


def _write(folder: Path, class_name: str, dtype: torch.dtype) -> None:
    """Write the network's shards and their index, holding one shard at a time."""
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}

    def close() -> None:
        file = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / file)
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in _random_state(class_name, folder, dtype):
        if shard and sum(value.nbytes for value in shard.values()) + tensor.nbytes > SHARD:
            close()
        shard[name] = tensor
    close()
    index: dict[str, Any] = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random_state(class_name: str, folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the network of a config.json once: normal and nowhere zero; the weights of norms are 1."""
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for name, like in outline_of(class_name, folder).items():
        if id(like) in seen:  # a second name of one tensor
            continue
        seen.add(id(like))
        if like.ndim == 1 and name.endswith("weight"):
            yield name, torch.ones(like.shape, dtype=dtype)
            continue
        drawn = (torch.randn(like.shape, generator=generator) * DEVIATION).to(dtype)
        yield name, torch.where(drawn == 0, torch.tensor(DEVIATION, dtype=dtype), drawn)
