"""The cards of both kinds of model, for servers with the fake worker, which needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

from app.cards.adapters import Adapter, Fit
from app.cards.card import Card

LABELS = ["tench, Tinca tinca", "goldfish", "crane", "house finch", "crane", "golden retriever"]
TEXT = """
id = "tiny-text"
family = "sd3"
source = { path = "." }
aliases = ["gpt-image-1"]
license = "apache-2.0"
gated = true
parameters = 6_543_210
bytes = 13_000_000
schedule = { kind = "flow", shift = 3.0 }
defaults = { sampler = "flow_euler", num_inference_steps = 4, guidance_scale = 3.0, size = "32x32" }
limits.sizes = { min = 16, max = 64, multiple = 16 }
limits.num_inference_steps = 50
limits.guidance_scale = 20.0
limits.n = 4
limits.prompt = 200
text = { clip = 16, t5 = 24 }
"""
LABEL = """
id = "tiny-label"
family = "dit"
source = { path = "." }
schedule = { kind = "diffusion", spacing = "linspace", variance = "learned_range" }
defaults = { sampler = "ddpm", num_inference_steps = 4, guidance_scale = 4.0, size = "32x32" }
limits = { num_inference_steps = 20, sizes = { min = 32, max = 32, multiple = 32, square = true }, n = 4 }
"""


def write_cards(folder: Path) -> Path:
    """Write both into a folder for each; returns the folder."""
    for name, text in (("tiny-text", TEXT), ("tiny-label", LABEL)):
        (folder / name).mkdir(parents=True)
        (folder / name / "card.toml").write_text(text, encoding="utf-8")
    index = {"id2label": {str(i): name for i, name in enumerate(LABELS)}}
    (folder / "tiny-label" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def adapter(name: str, *models: str, **facts: object) -> Adapter:
    """What the front knows of a LoRA that fits these models."""
    fit = Fit(rank=4, modules=6, parts=("transformer",), bytes=12_345)
    return Adapter(name=name, file=Path(f"{name}.safetensors"), stamp=(1,), fits=dict.fromkeys(models, fit), **facts)


def with_adapters(card: Card, *adapters: Adapter) -> Card:
    """The card of a server that has these."""
    return card.model_copy(update={"adapters": {one.name: one for one in adapters}})
