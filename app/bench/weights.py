"""Weights: a model folder of random weights at a card's true size, made of the configs that stand beside the card.

Knows nothing of what is measured with it: the folder is an ordinary one, which any server loads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from app.cards.card import Card, read_card
from app.cards.files import INDEX, read_json, to_toml
from app.errors import CheckpointError
from app.families import FAMILIES
from app.families.components import has_weights, outline_of

DEVIATION = 0.02
"""Of every weight: what transformers are initialised with, so that outputs stay finite at any depth."""

SHARD = 2 << 30
"""Most bytes that are made before they are written, but for a larger tensor."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def write_random(card: Card, cards: Mapping[str, Card], folder: Path, dtype: torch.dtype) -> Card:
    """Write the card's model with random weights under `folder`/<id> and return its card.

    A text encoder whose tokenizer does not stand beside the card is left out: its embeddings are then zeros. Raises
    CheckpointError: no model_index.json or config.json beside the card, OSError: no room.
    """
    made = folder / card.id
    made.mkdir(parents=True)
    index, places = _parts(card, cards)
    for name, place in places.items():
        shutil.copytree(place, made / name, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.pt"))
        if has_weights(index[name][1]):
            _write(made / name, index[name][1], dtype)
    (made / INDEX).write_text(json.dumps(index), encoding="utf-8")
    told = card.model_dump(mode="json", exclude_defaults=True, exclude={"folder", "labels", "components", "files"})
    lines = [f"{key} = {to_toml(value)}" for key, value in {**_said(told), "source": {"path": "."}}.items()]
    (made / "card.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_card(made / "card.toml")


def random_state(class_name: str, folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the network of a config.json once: normal and nowhere zero; the weights of norms are 1."""
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


def _write(folder: Path, class_name: str, dtype: torch.dtype) -> None:
    """The network's shards and their index, a shard at a time."""
    shard: dict[str, torch.Tensor] = {}
    held: dict[str, str] = {}

    def close() -> None:
        file = f"model-{len(set(held.values())) + 1:05}.safetensors"
        save_file(shard, folder / file)
        held.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in random_state(class_name, folder, dtype):
        if shard and sum(value.nbytes for value in shard.values()) + tensor.nbytes > SHARD:
            close()
        shard[name] = tensor
    close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}), encoding="utf-8")


def _parts(card: Card, cards: Mapping[str, Card]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The index to write, and of each part the folder with its config or its tokenizer's files."""
    family = FAMILIES[card.family]
    index = dict(read_json(_beside(card, INDEX)))
    places = {name: card.folder / (card.source.path or ".") / name for name in family.parts if index.get(name)}
    for name, target in card.components.items():
        owner, _, part = target.partition("/")
        index[name] = read_json(_beside(cards[owner], INDEX))[part]
        places[name] = cards[owner].folder / (cards[owner].source.path or ".") / part
    for name in family.parts:
        tokenizer = name.replace("text_encoder", "tokenizer")
        blind = name != tokenizer and not any(
            (places.get(tokenizer, card.folder) / f).is_file() for f in TOKENIZER_FILES
        )
        if index.get(name) in (None, [None, None]) or blind:
            index[name], index[tokenizer] = [None, None], [None, None]
            places = {part: place for part, place in places.items() if part not in (name, tokenizer)}
    index["scheduler"] = None
    return index, places


def _beside(card: Card, name: str) -> Path:
    file = card.folder / (card.source.path or ".") / name
    if not file.is_file():
        raise CheckpointError(f"{card.id}: random weights need the configs beside the card, and {file} is missing")
    return file


def _said(value: Any) -> Any:
    """Without what is not there, which TOML cannot say."""
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items() if item is not None}
    return value
