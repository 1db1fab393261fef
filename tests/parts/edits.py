"""Pictures and masks to start from, as a body has them and as a request has them."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from PIL import Image

from app.jobs.edit import with_source
from app.request import Request, Source
from tests.parts.requests import changed


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: soft colours with some noise, the same at every call."""
    rows, columns = np.mgrid[:height, :width] / 10.0
    waves = np.stack([np.sin(rows + seed), np.cos(columns), np.sin(rows - columns + seed)], axis=-1)
    dice = np.random.default_rng(seed)
    return np.clip(127 + 90 * waves + 25 * dice.standard_normal(waves.shape), 0, 255).astype(np.uint8)


def half_mask(width: int, height: int, cell: int = 4) -> np.ndarray:
    """uint8 [height, width]: 255 (painted anew) in whole cells of a disc off the centre and of a narrow column, else 0.

    The tiny models have latents of 4 x 4 pixels.
    """
    rows, columns = np.mgrid[: height // cell, : width // cell] * cell
    disc = ((rows / height - 0.45) ** 2 + (columns / width - 0.6) ** 2) < 0.12
    disc[:, 4 // cell] = True
    return np.where(disc, 255, 0).astype(np.uint8).repeat(cell, 0).repeat(cell, 1)


def grown(mask: np.ndarray, cell: int = 4) -> np.ndarray:
    """The mask in whole cells: all of those of which it has any pixel."""
    height, width = mask.shape
    cells = mask.reshape(height // cell, cell, width // cell, cell).max(axis=(1, 3))
    return cells.repeat(cell, 0).repeat(cell, 1)


def as_field(pixels: np.ndarray) -> str:
    """Base64 of a PNG, as a body takes a picture or a mask."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def edited(request: Request, strength: float, masked: bool = False, seed: int = 0) -> Request:
    """The request, starting from `picture` of this seed, and with `half_mask` where it is masked."""
    size = request.recipe.width, request.recipe.height
    source = Source(picture(*size, seed).tobytes(), half_mask(*size).tobytes() if masked else None)
    return with_source(changed(request, strength=strength), source)
