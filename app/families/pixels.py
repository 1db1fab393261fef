"""Pixels: the last step from what a decoder gives to what a file holds."""

from __future__ import annotations

import torch

from app.errors import NonFiniteOutput


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """image [B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3], rounded as diffusers' pipelines round.

    Raises NonFiniteOutput when any number of the batch is not finite, because rounding would make a black picture of
    it. The caller halves the batch until the bad image is alone (`engine/outcome.py`).
    """
    if not torch.isfinite(image).all():
        raise NonFiniteOutput("the decoder gave numbers that are not finite")
    pixels: torch.Tensor = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
