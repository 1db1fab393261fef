"""Models of which some fit each other as base and refiner, as far as a front looks at them: cards and configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.parts.cards import TEXT, write_cards

VAE = {"latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06, "block_out_channels": [8, 8, 8, 8]}
PLAIN = TEXT.replace('aliases = ["gpt-image-1"]\n', "")
SHIFT = "shift = 3.0"


def write_model(folder: Path, name: str, text: str = PLAIN, more: str = "", **vae: Any) -> None:
    """A card, and as much of a model as says what its latents are."""
    (folder / name / "vae").mkdir(parents=True)
    text = text.replace('"tiny-text"', f'"{name}"')
    (folder / name / "card.toml").write_text(f"{text}{more}", encoding="utf-8")
    index = {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / name / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / name / "vae" / "config.json").write_text(json.dumps(VAE | vae), encoding="utf-8")


def write_refiners(folder: Path) -> Path:
    """Models that fit each other, and some that do not."""
    write_cards(folder)
    write_model(folder, "base", more="framing = true\n")
    write_model(folder, "fine", PLAIN.replace("max = 64", "max = 48"), 'aliases = ["finer"]\n')
    write_model(folder, "shared", more='components = { vae = "base/vae" }\n')
    write_model(folder, "auto", more='refiner = { model = "fine", switch_at = 0.5 }\n')
    write_model(folder, "scaled", scaling_factor=1.25)
    write_model(folder, "deeper", block_out_channels=[8, 8, 8])
    write_model(folder, "shifted", PLAIN.replace(SHIFT, "shift = 2.0"))
    write_model(folder, "dev", PLAIN.replace('"sd3"', '"flux"'), 'guidance = "embedded"\n')
    (folder / "inked").mkdir()
    variant = 'id = "inked"\nbase = "fine"\nloras = [{ name = "ink" }]\n'
    (folder / "inked" / "card.toml").write_text(variant, encoding="utf-8")
    return folder
