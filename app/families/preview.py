"""A quick look at a latent: the VAE decoder replaced by the linear map that comes nearest to it.

Knows nothing of samplers: it is given predicted clean latents, and makes pixels of them at the price of one small
matrix product, where the decoder costs as much as several steps of the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from app.families.pixels import to_pixels

IMAGES = 8
SIDE = 16
"""Latent pixels along a side of the images that the map is fitted on: IMAGES * SIDE^2 equations for 9C + 1 unknowns."""

RIDGE = 1e-3


class LinearPreview:
    """Least squares from the 3x3 neighbourhood of a latent pixel to the f x f patch of pixels that it stands for.

    Fitted once to what this VAE itself does to simple drawn shapes; the same VAE gives the same map. The one-pixel
    form of the idea is known as latent2rgb; a patch from a neighbourhood keeps edges.
    """

    def __init__(self, vae: Any) -> None:
        self._patch = int(2 ** (len(vae.config.block_out_channels) - 1))
        images = shapes(IMAGES, SIDE * self._patch).to(vae.device, vae.dtype)
        z = vae.encode(images).latent_dist.mode()
        scale, shift = vae.config.scaling_factor or 1.0, vae.config.shift_factor or 0.0
        pixels = vae.decode(z, return_dict=False)[0].float()
        self._map = fit(neighbourhoods((z.float() - shift) * scale), functional.pixel_unshuffle(pixels, self._patch))

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, C, h, w] float32 -> uint8 [B, f h, f w, 3] on the same device. Raises NonFiniteOutput."""
        features = neighbourhoods(latents)
        patches = torch.einsum("bkhw,kp->bphw", features, self._map)
        return to_pixels(functional.pixel_shuffle(patches, self._patch))


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
