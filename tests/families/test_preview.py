"""The linear preview: exact where the decoder is linear, and near where it is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from app.families.base import to_pixels
from app.families.vae import neighbourhoods, preview, shapes


class LinearVAE:
    """An autoencoder whose decoder is one 3x3 convolution and a pixel shuffle: what the preview can be exact for."""

    config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), scaling_factor=1.7, shift_factor=0.2)
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.down = torch.randn(4, 3, 8, 8, generator=generator) * 0.05
        self.up = torch.randn(192, 4, 3, 3, generator=generator) * 0.05

    def encode(self, images: torch.Tensor) -> Any:
        z = functional.conv2d(images, self.down, stride=8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        padded = functional.pad(z, (1, 1, 1, 1), mode="replicate")
        return (functional.pixel_shuffle(functional.conv2d(padded, self.up), 8),)


def test_a_linear_decoder_is_found_exactly() -> None:
    vae = LinearVAE()
    latents = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)) * 0.5
    image = vae.decode(latents / 1.7 + 0.2, return_dict=False)[0]
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    seen = to_pixels(preview(vae, latents))
    assert seen.shape == (2, 40, 56, 3) and seen.dtype == torch.uint8
    assert (seen.float() - expected).abs().max() <= 1


def test_the_same_vae_gives_the_same_preview() -> None:
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(preview(LinearVAE(), latents), preview(LinearVAE(), latents))


def test_a_neighbourhood_is_the_pixel_and_those_around_it() -> None:
    latents = torch.arange(2 * 9, dtype=torch.float32).view(1, 2, 3, 3)
    middle = neighbourhoods(latents)[0, :, 1, 1]
    assert middle.tolist() == [*latents[0, 0].flatten().tolist(), *latents[0, 1].flatten().tolist(), 1.0]


def test_the_shapes_fill_the_range() -> None:
    images = shapes(4, 32)
    assert images.shape == (4, 3, 32, 32)
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.3
