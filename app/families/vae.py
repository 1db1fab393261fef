"""VAE: latents to pixels, with the scale and shift of its config.

Knows nothing of the network that made the latents, nor of image formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from app.families.pixels import to_pixels
from app.families.preview import LinearPreview

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_keys(state: dict[str, torch.Tensor], expected: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Rename the attention of files written before diffusers 0.17 (`query` for `to_q` and so on)."""
    return {_new_name(key): value for key, value in state.items()}


def _new_name(key: str) -> str:
    head, _, parameter = key.rpartition(".")
    owner, _, layer = head.rpartition(".")
    if ".attentions." in key and layer in _OLD_ATTENTION:
        return f"{owner}.{_OLD_ATTENTION[layer]}.{parameter}"
    return key


def pixels_per_latent(vae: Any) -> int:
    """Image pixels for each latent pixel along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


_PREVIEWS: WeakKeyDictionary[Any, LinearPreview] = WeakKeyDictionary()


def linear_preview(vae: Any) -> LinearPreview:
    """The VAE's linear map from latents to pixels, fitted once for all the models that share the VAE.

    The first call needs the VAE's weights; the map outlives them.
    """
    if vae not in _PREVIEWS:
        with torch.inference_mode():
            _PREVIEWS[vae] = LinearPreview(vae)
    return _PREVIEWS[vae]


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """latents [B, C, h, w] float32 -> uint8 [B, H, W, 3]; the maths and the rounding of diffusers' pipelines.

    z = latents / scaling_factor + shift_factor, either of which a config may leave out. Raises NonFiniteOutput.
    """
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    z = latents / (1.0 if scale is None else scale) + (0.0 if shift is None else shift)
    return to_pixels(vae.decode(z.to(vae.dtype), return_dict=False)[0].float())
