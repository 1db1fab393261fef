"""FLUX.1's parts and cards that do not fit each other are refused, and the message says which."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from app.cards.card import Card, Sizes, Text
from app.cards.cards import read_card
from app.errors import CheckpointError
from app.families import Flux
from tests.families.plain import build, build_component
from tests.parts.tiny_parts import read_state


@cache
def read(folder: Path) -> tuple[Card, dict[str, Any]]:
    card = read_card(folder / "card.toml")
    return card, build(card)


def make(card: Card, parts: dict[str, Any]) -> Flux:
    return Flux(card, parts, "cpu", parts["transformer"].dtype)


def sizes(card: Card, **changes: Any) -> Card:
    limits = card.limits.model_copy(update={"sizes": Sizes(**{"min": 16, "max": 64, "multiple": 16, **changes})})
    return card.model_copy(update={"limits": limits})


@pytest.mark.parametrize("name", ["schnell", "dev"])
def test_guidance_is_what_the_network_takes(fluxes: Path, name: str) -> None:
    (card, _), (_, others) = read(fluxes / name), read(fluxes / {"schnell": "dev", "dev": "schnell"}[name])
    wants = {"schnell": "embedded", "dev": "cfg"}[name]
    with pytest.raises(CheckpointError, match=rf'card\.toml: guidance: this is a network for "{wants}"'):
        make(card, others)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"in_channels": 64}, "channels are not the VAE's"),
        ({"out_channels": 8}, "channels are not the VAE's"),
        ({"patch_size": 2}, "patch_size"),
        ({"axes_dims_rope": (4, 6, 4)}, "axes_dims_rope"),
        ({"axes_dims_rope": (8, 8)}, "axes_dims_rope"),
        ({"axes_dims_rope": (5, 5, 6)}, "axes_dims_rope"),
        ({"axes_dims_rope": (-4, 10, 10)}, "axes_dims_rope"),
        ({"axes_dims_rope": ["4", "6", "6"]}, "axes_dims_rope"),
        ({"axes_dims_rope": 16}, "axes_dims_rope"),
        ({"joint_attention_dim": 40}, "the T5 is not as wide"),
        ({"pooled_projection_dim": 24}, "the CLIP is not as wide"),
    ],
)
def test_a_network_of_another_kind(fluxes: Path, changes: dict[str, Any], problem: str) -> None:
    card, parts = read(fluxes / "schnell")
    config = {key: value for key, value in parts["transformer"].config.items() if not key.startswith("_")}
    assert make(card, {**parts, "transformer": FluxTransformer2DModel(**config)}).denoise
    with pytest.raises(CheckpointError, match=problem):
        make(card, {**parts, "transformer": FluxTransformer2DModel(**{**config, **changes})})


@pytest.mark.parametrize(
    "change",
    [
        {"num_single_layers": 10**9},
        {"num_layers": 10**9},
        {"attention_head_dim": -16},
        {"num_attention_heads": 10**6},
        {"in_channels": "16"},
        {"guidance_embeds": True},
        {"patch_size": 1.5},
    ],
    ids=str,
)
def test_a_config_that_lies(fluxes: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    part = fluxes / "schnell" / "transformer"
    state, config = read_state(part), json.loads((part / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=tmp_path.name):
        build_component("FluxTransformer2DModel", tmp_path, state, torch.float32)


@pytest.mark.parametrize("changes", [{"multiple": 12, "min": 24}, {"min": 20}])
def test_sizes_are_of_whole_patches(fluxes: Path, changes: dict[str, int]) -> None:
    card, parts = read(fluxes / "dev")
    assert make(sizes(card), parts).image_tokens(16, 16) == 4
    with pytest.raises(CheckpointError, match=rf"card\.toml: limits\.sizes\.{next(iter(changes))}: not a multiple"):
        make(sizes(card, **changes), parts)


def test_encoders_need_their_tokenizers_and_their_length(fluxes: Path) -> None:
    card, parts = read(fluxes / "dev")
    with pytest.raises(CheckpointError, match="text_encoder_2 needs a tokenizer_2"):
        make(card, {name: part for name, part in parts.items() if name != "tokenizer_2"})
    with pytest.raises(CheckpointError, match=r"text\.clip: longer than the CLIP's position table"):
        make(card.model_copy(update={"text": Text(clip=25)}), parts)
