"""Vaes: the VAE that a converted model gets, from a folder in diffusers' layout or a file in its authors'.

Knows nothing of the network beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.cards.files import read_json
from app.cards.folder import Part
from app.checkpoints.parts import part_outline
from app.checkpoints.tensors import State
from app.errors import CheckpointError

VAE = "AutoencoderKL"


def open_vae(place: Path | None) -> tuple[Part, dict[str, Any]]:
    """The VAE as a part, with its config: that of its folder, or what its file's tensors say."""
    if place is None:
        raise CheckpointError("a .pt holds no VAE: give one with --vae")
    if place.is_dir():
        return Part("vae", VAE, place), read_json(place / "config.json")
    part = Part("vae", VAE, place.parent, place)
    return part, vae_config(part_outline(part))


def vae_config(state: State) -> dict[str, Any]:
    """diffusers' config of an autoencoder by diffusers' names, with the scale of the first latent diffusion models."""
    channels = [
        state[key].shape[0] for i in range(9) if (key := f"encoder.down_blocks.{i}.resnets.0.conv1.weight") in state
    ]
    latent, first = state.get("decoder.conv_in.weight"), "encoder.down_blocks.0.resnets."
    return {
        "_class_name": VAE,
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "latent_channels": 4 if latent is None else latent.shape[1],
        "layers_per_block": len({key.split(".")[4] for key in state if key.startswith(first)}),
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": 0.18215,
    }
