"""Pictures as text: half-block cells, two pixels a character.

Knows nothing of files or requests.
"""

from __future__ import annotations

import numpy as np
from rich.color import Color
from rich.style import Style
from rich.text import Text


def half_blocks(pixels: np.ndarray, columns: int) -> Text:
    """uint8 [height, width, 3] as lines of at most `columns` characters; each cell shows two pixels, upper and lower.

    Larger pictures are averaged down, smaller ones are not enlarged.
    """
    height, width, _ = pixels.shape
    across = max(1, min(columns, width))
    down = max(2, round(height * across / width / 2) * 2) if height > 1 else 1
    small = shrink(pixels, across, min(down, height))
    if len(small) % 2:
        small = np.concatenate([small, small[-1:]])
    lines = []
    for upper, lower in zip(small[0::2], small[1::2], strict=True):
        cells = (("▀", _style(above, below)) for above, below in zip(upper.tolist(), lower.tolist(), strict=True))
        lines.append(Text.assemble(*cells, no_wrap=True))
    return Text("\n").join(lines)


def shrink(pixels: np.ndarray, across: int, down: int) -> np.ndarray:
    """Box-averaged uint8 [height, width, 3] -> uint8 [down, across, 3], for down <= height and across <= width."""
    height, width, _ = pixels.shape
    rows, columns = np.arange(down) * height // down, np.arange(across) * width // across
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float64), rows, axis=0), columns, axis=1)
    areas = np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)[None]
    mean: np.ndarray = np.rint(sums / areas[:, :, None]).astype(np.uint8)
    return mean


def _style(above: list[int], below: list[int]) -> Style:
    return Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
