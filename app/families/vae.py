"""VAE: the names of its tensors, and previews by the linear map that is nearest to its decoder."""

import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)(?=\.)")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

IMAGES = 8
SIDE = 16
"""Latent pixels along a side of the images that the map is fitted on: IMAGES * SIDE^2 equations for 9C + 1 unknowns."""

RIDGE = 1e-3

_MAPS: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()


def vae_keys(state: dict[str, torch.Tensor], expected: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Rename the attention of files written before diffusers 0.17 (`query` for `to_q` and so on)."""
    return {
        _OLD_ATTENTION.sub(lambda old: f"{old[1]}.{_ATTENTION[old[2]]}", key): value for key, value in state.items()
    }


def pixels_per_latent(vae: Any) -> int:
    """Image pixels for each latent pixel along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def preview(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """latents [B, C, h, w] float32 -> [B, 3, H, W] in -1..1, by the linear map of the VAE.

    One small matrix product, where the decoder costs as much as several steps of the network. The one-pixel form is
    known as latent2rgb; a patch from a neighbourhood keeps edges.
    """
    patches = torch.einsum("bkhw,kp->bphw", neighbourhoods(latents), linear_map(vae))
    return functional.pixel_shuffle(patches, pixels_per_latent(vae))


def linear_map(vae: Any) -> torch.Tensor:
    """The map from a latent pixel's 3x3 neighbourhood to the f x f patch of pixels under it: float32 [9C + 1, 3ff].

    Fitted once, by least squares, to the VAE's own output for drawn shapes. The first call needs the VAE's weights; the
    map outlives them, and models that share the VAE share it.
    """
    if vae not in _MAPS:
        patch = pixels_per_latent(vae)
        scale, shift = vae.config.scaling_factor or 1.0, vae.config.shift_factor or 0.0
        with torch.inference_mode():
            z = vae.encode(shapes(IMAGES, SIDE * patch).to(vae.device, vae.dtype)).latent_dist.mode()
            pixels = vae.decode(z, return_dict=False)[0].float()
            features = neighbourhoods((z.float() - shift) * scale)
            _MAPS[vae] = fit(features, functional.pixel_unshuffle(pixels, patch))
    return _MAPS[vae]


def neighbourhoods(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> [B, 9C + 1, h, w]: each latent pixel with its eight neighbours, and a one."""
    rows, channels, height, width = latents.shape
    padded = functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    around = functional.unfold(padded, 3).view(rows, 9 * channels, height, width)
    return torch.cat([around, torch.ones_like(latents[:, :1])], 1)


def fit(features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Ridge regression in float64: features [B, K, h, w], patches [B, P, h, w] -> [K, P] float32."""
    x = features.double().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    y = patches.double().permute(0, 2, 3, 1).reshape(-1, patches.shape[1])
    normal = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights: torch.Tensor = torch.linalg.solve(normal, x.T @ y)
    return weights.float()


def shapes(count: int, side: int) -> torch.Tensor:
    """Coloured ellipses on shaded grounds, the same at every call: float32 [count, 3, side, side] in -1..1."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    images = draw(count, 3, 1, 1) + (draw(count, 3, 1, 1) - 0.5) * x + (draw(count, 3, 1, 1) - 0.5) * y
    for _ in range(8):
        cx, cy = draw(2, count, 1, 1)
        rx, ry = 0.05 + 0.3 * draw(2, count, 1, 1)
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        images = torch.where(inside[:, None], draw(count, 3, 1, 1), images)
    return images.clamp(0, 1) * 2 - 1
