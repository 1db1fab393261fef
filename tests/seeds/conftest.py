"""Tiny random checkpoints of every family in several configs, once for the tests that hold them to diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parts.tiny import write_dit, write_flux, write_sd3
from tests.parts.tiny_unets import write_unet

SMALL = {"min = 16, max = 64, multiple = 16": "min = 16, max = 64, multiple = 8"}
SKIPPING = {**SMALL, "text = {": "skip_layer_guidance = { layers = [1, 2] }\ntext = {"}
ODD = {'"32x32"': '"40x40"', "min = 32, max = 32, multiple = 32": "min = 40, max = 40, multiple = 8"}


@pytest.fixture(scope="session")
def seed_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cards, each with its own files; a token of their networks is 8 pixels wide and high."""
    folder = tmp_path_factory.mktemp("seeds") / "models"
    _write_dits(folder)
    _write_sd3s(folder)
    _write_fluxes(folder)
    _write_unets(folder)
    return folder


def _write_dits(folder: Path) -> None:
    for name, edits, config in (("dit", {}, {}), ("dit-odd", ODD, {"num_layers": 3, "sample_size": 10, "seed": 3})):
        write_dit(folder / name, classes=1000, **config)
        _edit(folder / name, {'"tiny-dit"': f'"{name}"', **edits})


def _write_sd3s(folder: Path) -> None:
    medium = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2), "num_layers": 4}
    small = {"num_layers": 1, "attention_head_dim": 8, "caption_projection_dim": 16}
    configs: dict[str, dict[str, Any]] = {
        "sd3": {},
        "sd3-no-t5": {"seed": 13, "leave_out": ("text_encoder_3",), **small},
        "sd3-no-clip": {"seed": 16, "leave_out": ("text_encoder_2",)},
        "sd3.5-large": {"seed": 20, "qk_norm": "rms_norm", "num_layers": 3},
        "sd3.5-medium": {"seed": 23, **medium},
        # diffusers' inpaint pipeline takes networks of 16 channels alone.
        "sd3-16": {"seed": 26, "in_channels": 16, "out_channels": 16},
    }
    for name, config in configs.items():
        write_sd3(folder / name, name=name, **config)
        _edit(folder / name, SKIPPING if name == "sd3.5-medium" else SMALL)


def _write_fluxes(folder: Path) -> None:
    thin = {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
    wide = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32, "axes_dims_rope": (16, 8, 8)}
    configs: dict[str, dict[str, Any]] = {
        "schnell": {"dev": False},
        "schnell-no-t5": {"dev": False, "seed": 33, "leave_out": ("text_encoder_2",), **thin},
        "dev": {"dev": True, "seed": 36},
        "dev-no-clip": {"dev": True, "seed": 39, "leave_out": ("text_encoder",), "tokens": 4096, **wide},
    }
    for name, config in configs.items():
        write_flux(folder / name, **config)


def _write_unets(folder: Path) -> None:
    deep = {"layers_per_block": 2, "transformer_layers_per_block": (1, 2, 1), "block_out_channels": (16, 16, 32)}
    wide = {"seed": 60, "attention_head_dim": (2, 2, 4), "upcast_attention": True}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "sd15": ("sd15", {}),
        "sd2": ("sd2", wide),
        "sdxl": ("sdxl", {}),
        "sdxl-deep": ("sdxl", {"seed": 70, **deep}),
        "sdxl-turbo": ("sdxl-turbo", {}),
        "refiner": ("refiner", {"sdxl": "sdxl"}),
    }
    for name, (kind, config) in configs.items():
        write_unet(folder / name, kind, **config)


def _edit(folder: Path, edits: dict[str, str]) -> None:
    """Other words in the card."""
    file = folder / "card.toml"
    text = file.read_text(encoding="utf-8")
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
