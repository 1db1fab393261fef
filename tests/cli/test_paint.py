"""Half-block cells show the pixels that they stand for."""

from __future__ import annotations

import numpy as np
from rich.text import Text

from app.cli.paint import half_blocks, shrink


def cells(text: Text) -> np.ndarray:
    """The pixels that a painting shows, read back from its styles: [2 * lines, columns, 3]."""
    rows = []
    for line in text.split("\n"):
        spans = [span.style for span in line.spans]
        for name in ("color", "bgcolor"):
            rows.append([getattr(style, name).triplet for style in spans])
    return np.array(rows, np.uint8)


def test_a_small_picture_is_shown_pixel_by_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    text = half_blocks(pixels, columns=80)
    assert text.plain == "\n".join(["▀" * 6] * 4)
    assert (cells(text) == pixels).all()


def test_an_odd_height_repeats_its_last_line() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    shown = cells(half_blocks(pixels, columns=40))
    assert (shown[:3] == pixels).all() and (shown[3] == pixels[2]).all()


def test_a_large_picture_is_averaged_into_the_columns() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    shown = cells(half_blocks(pixels, columns=32))
    plain = pixels.reshape(16, 4, 32, 4, 3).mean(axis=(1, 3))
    assert shown.shape == (16, 32, 3)
    assert np.abs(shown - plain).max() <= 0.5


def test_shrink_covers_every_pixel_once_when_sizes_do_not_divide() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    assert (shrink(pixels, 11, 7) == pixels).all()
    assert np.allclose(shrink(pixels, 1, 1)[0, 0], pixels.mean(axis=(0, 1)), atol=0.5)
