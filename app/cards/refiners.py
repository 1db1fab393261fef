"""Refiners: whether a model can draw the last part of a picture that another one began, without a look at weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.cards.card import Card
from app.cards.files import read_json
from app.cards.folder import ModelFolder, changes
from app.errors import CheckpointError, NotDownloaded

_VAE = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}
"""The keys of a VAE's config.json that say what its latents mean, with diffusers' defaults."""


def latent_facts(card: Card, cards: Mapping[str, Card]) -> dict[str, Any]:
    """Describe the latents of a model by its VAE's config.json, from its files or from beside its card.

    Empty if neither can be read.
    """
    try:
        folder = ModelFolder(card, cards)
        try:
            parts = folder.parts()
        except NotDownloaded:
            parts = folder.beside().parts()
        vae = next(part for part in parts if part.name == "vae")
        config = read_json(vae.folder / "config.json")
        side = 2 ** (len(config.get("block_out_channels", (64,))) - 1)
    except (CheckpointError, OSError, ValueError, RuntimeError, StopIteration, TypeError):
        return {}
    shape = f"{config.get('latent_channels', 4)} channels for {side} x {side} pixels"
    return {"latent shape": shape, **{f"VAE's {key}": config.get(key, value) for key, value in _VAE.items()}}


def unlike(base: Card, refiner: Card, own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why one model cannot go on where another one stops, with both values; empty where it can.

    own, other: the `latent_facts` of the two. Weights are not compared; the VAE's configs are trusted.
    """
    if base.model == refiner.model:
        return "it is the same model"
    if refiner.base:
        return f"it has LoRAs of its own, and a refiner draws without any; name {refiner.base}"
    if base.draws_classes or refiner.draws_classes:
        return "one of them draws classes"
    if not (own and other):
        return f"the config of {(refiner if own else base).id}'s VAE cannot be read here"
    found = [f"its {name} is {other[name]}, not {own[name]}" for name in own if own[name] != other[name]]
    if base.schedule != refiner.schedule:
        found += [f"its schedule's {text}" for text in changes(base.schedule, refiner.schedule.model_dump())]
    if base.guidance != refiner.guidance:
        found.append(f"its guidance is {refiner.guidance}, not {base.guidance}")
    return "; ".join(found)
