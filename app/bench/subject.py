"""The model that is measured: a card with its files, or with random weights of the same size where it has none."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from app.cards.card import Card
from app.cards.cards import read_card, read_cards
from app.cards.catalog import Registry
from app.cards.files import INDEX, read_toml, write_json, write_toml
from app.cards.folder import ModelFolder, Part
from app.checkpoints.tensors import write_shards
from app.errors import CheckpointError, LoadError
from app.families import FAMILIES
from app.families.base import Family
from app.families.components import has_weights, outline_of
from app.pool.policy import PHASES
from app.pool.pool import Pool
from app.settings import Settings
from app.worker import plan
from app.worker.process import build, resolve_dtype

DEVIATION = 0.02
"""Standard deviation of random weights, as transformers are initialised, so that outputs stay finite at any depth."""

SHARD = 2 << 30
"""Most bytes of float32 numbers in one file of random weights, except where one tensor is larger."""


@contextmanager
def loaded(settings: Settings, model: str | None, *, random_weights: bool = False) -> Iterator[tuple[Pool, Family]]:
    """Load all parts of the card of this name, and free the memory at the end.

    Raises InstepError: there is no such card, or its files are not here.
    """
    with chosen(settings, model, random_weights=random_weights) as (settings, card):
        cards = dict(read_cards(settings.models, settings.alias))
        pool, _ = build(settings, cards, plan.devices(settings.devices)[0], lambda report: None)
        try:
            yield pool, _load(pool, card)
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
        yield settings.model_copy(update={"models": Path(folder), "alias": ""}), made


def _load(pool: Pool, card: Card) -> Family:
    """Wait until all parts of the family are on the device."""
    pool.want(card.id)
    while (family := pool.family(card.id)) is None or not all(pool.resident(card.id, phase) for phase in PHASES):
        if error := pool.failure(card.id):
            raise error
        if family is not None and not pool.fits(card.id):
            why = f"{card.id}: its parts do not fit the device together (INSTEP_DEVICE_MEMORY)"
            raise LoadError(why, code="insufficient_gpu_memory")
        time.sleep(0.01)
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
    write_json(made / INDEX, index)
    facts = read_toml(card.file) | {"source": {"path": "."}}
    write_toml(made / "card.toml", {key: value for key, value in facts.items() if key not in ("components", "files")})
    return read_card(made / "card.toml")


def _parts(card: Card, cards: Mapping[str, Card]) -> dict[str, Part]:
    """The parts by name, as if every card's files stood beside it, less text encoders that have no tokenizer."""
    try:
        found = ModelFolder(card, cards).beside().parts()
    except CheckpointError as error:
        raise CheckpointError(f"{card.id}: random weights need the configs beside the card: {error.message}") from error
    parts = {part.name: part for part in found if part.name in FAMILIES[card.family].parts}
    for encoder in [name for name in parts if name.startswith("text_encoder")]:
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        try:
            parts[tokenizer].check()
        except (KeyError, CheckpointError):
            del parts[encoder]
            parts.pop(tokenizer, None)
    return parts


def _write(folder: Path, class_name: str, dtype: torch.dtype) -> None:
    """Write random weights of the network, each tensor under its first name alone."""
    first = {id(like): name for name, like in reversed(outline_of(class_name, folder).items())}
    outline = {name: like for name, like in outline_of(class_name, folder).items() if first[id(like)] == name}
    generator = torch.Generator().manual_seed(0)
    write_shards(folder, outline, SHARD, lambda name: _random(name, outline[name], generator).to(dtype))


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor of this shape that is normal and nowhere zero; the weights of norms are 1."""
    if like.ndim == 1 and name.endswith("weight"):
        return torch.ones(like.shape)
    drawn = torch.randn(like.shape, generator=generator) * DEVIATION
    return torch.where(drawn == 0, DEVIATION, drawn)
