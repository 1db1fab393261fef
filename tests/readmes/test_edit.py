"""The README's edit: what the mask keeps is kept exactly, and what is around the apple changes its colour."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.readmes.edit import FOLDER, YELLOW, draw

COLOURS = {"blue": (30, 90, 225), "yellow": (255, 212, 90)}
"""Those of the backgrounds that emoji-mmdit learned, as it draws them."""
NEAR = 60.0


def far(pixels: np.ndarray, name: str) -> float:
    """How far the mean of these pixels [N, 3] is from a colour, in steps of 256."""
    return float(np.abs(pixels.mean(0) - COLOURS[name]).max())


@pytest.mark.slow
def test_the_background_changes_and_the_apple_does_not(tmp_path: Path) -> None:
    apple = np.asarray(Image.open(FOLDER / "apple.png").convert("RGB"))
    files = ["--image", str(FOLDER / "apple.png"), "--mask", str(FOLDER / "background.png"), "--strength", "1"]
    try:
        yellow = np.asarray(draw(tmp_path / "yellow.png", YELLOW, *files))
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr.decode())
    masked = np.asarray(Image.open(FOLDER / "background.png")) > 127
    assert 0.3 < masked.mean() < 0.8
    assert (yellow[~masked] == apple[~masked]).all()
    corners = np.concatenate([yellow[:8, :8].reshape(-1, 3), yellow[-8:, -8:].reshape(-1, 3)])
    assert far(corners, "yellow") < NEAR < 2 * NEAR < far(corners, "blue")
    before = np.concatenate([apple[:8, :8].reshape(-1, 3), apple[-8:, -8:].reshape(-1, 3)])
    assert far(before, "blue") < NEAR < 2 * NEAR < far(before, "yellow")
