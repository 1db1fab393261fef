"""A family without pool and engine: its parts built one after the other, and one image sampled in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.card import Card, read_card
from app.families import FAMILIES
from app.families.base import Family
from app.families.components import build_component, has_weights
from app.pool.layout import read_parts
from app.pool.weights import read_state
from app.request import Condition
from app.samplers.table import compile_table


def build_parts(card: Card, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The parts of a card that shares none with another card."""
    return {
        part.name: build_component(
            part.class_name, part.folder, read_state(part.folder) if has_weights(part.class_name) else None, dtype
        )
        for part in read_parts(card, {})
    }


def load(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Family:
    """The family of the card in `folder`, of which `changes` replace fields."""
    card = read_card(folder / "card.toml").model_copy(update=changes)
    return FAMILIES[card.family](card, build_parts(card, dtype), "cpu", dtype)


@torch.inference_mode()
def sample(
    family: Family,
    condition: Condition,
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    sampler: str,
    seed: int = 0,
    text_length: int = 24,
) -> torch.Tensor:
    """One image's final latent [1, C, h, w] by the update rule of DESIGN.md section 4; noise from a CPU generator."""
    table = compile_table(family.card.schedule, sampler, steps, tokens=family.image_tokens(*size))
    pair = [condition, family.opposite(condition)] if guidance > 1 else [condition]
    conditions = family.encode(pair, text_length)
    generator = torch.Generator().manual_seed(seed)
    x = table.init * torch.randn((1, *family.latent_shape(*size)), generator=generator)
    mem = torch.zeros_like(x)
    for t, c_in, xx, xo, xm, xz, zf, mx, mo in table.coefficients().tolist():
        batch = (c_in * x).repeat(len(pair), 1, 1, 1)
        out, frac = family.denoise(batch, torch.full((len(pair),), t), conditions)
        out = out[-1:] + guidance * (out[:1] - out[-1:]) if guidance > 1 else out
        new = xx * x + xo * out + xm * mem
        if xz:
            scale = xz if frac is None else xz * torch.exp(0.5 * zf * frac[:1])
            new = new + scale * torch.randn(x.shape, generator=generator)
        x, mem = new, mx * x + mo * out
    return x


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative error, in the 2-norm."""
    return float((ours - theirs).norm() / theirs.norm())
