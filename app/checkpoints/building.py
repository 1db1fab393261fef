"""Building: from built parts to a family; and, for a check of a checkpoint, all of its parts at once on the CPU.

Knows nothing of what is already on a device: the pool builds and shares parts itself (component.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from app.cards.card import Card
from app.cards.folder import Part
from app.checkpoints.layout import read_parts
from app.checkpoints.parts import part_outline, part_states
from app.families import FAMILIES
from app.families.base import Family
from app.families.components import blank_network, build_tokenizer, fill_network, has_weights


def part_dtype(part: Part, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The number format of a part of a model in `dtype`: a VAE on the CPU is float32 always."""
    return torch.float32 if part.name == "vae" and device.type == "cpu" else dtype


def build_part(part: Part, device: torch.device, dtype: torch.dtype) -> Any:
    """A network on the device, or a tokenizer. Raises CheckpointError."""
    if not has_weights(part.class_name):
        return build_tokenizer(part.class_name, part.folder)
    network = blank_network(part.class_name, part.folder, part_outline(part), part.file)
    own = part_dtype(part, device, dtype)
    fill_network(network, part.class_name, part.weights, part_states(part), device, own)
    return network


def build_parts(card: Card, cards: Mapping[str, Card], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Every part of the card, by its name. Raises CheckpointError."""
    return {part.name: build_part(part, device, dtype) for part in read_parts(card, cards)}


def build_family(card: Card, parts: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Family:
    """The family of built parts. Raises CheckpointError: they do not fit each other or the card."""
    with torch.inference_mode():
        family: Family = FAMILIES[card.family](card, dict(parts), device, dtype)
    return family
