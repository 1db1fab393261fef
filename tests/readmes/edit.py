"""The pictures of the README's edit: an apple, a mask of what is around it, and the three beside each other.

`python -m tests.readmes.edit` draws them again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

FOLDER = Path(__file__).parent.parent.parent / "docs" / "edit"
INSTEP = Path(sys.executable).parent / "instep"
APPLE, YELLOW = "red apple on a blue background", "red apple on a yellow background"
LIKE = 120
"""How far the colour of the background may be from that of the corner, summed over the channels."""


def draw(out: Path, prompt: str, *more: str) -> Image.Image:
    words = [INSTEP, "generate", prompt, "--model", "emoji-mmdit", "--seed", "7", "-o", out, *more]
    environment = {**os.environ, "INSTEP_THREADS": "1"}
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=300, env=environment)
    return Image.open(out).convert("RGB")


def background(picture: Image.Image) -> Image.Image:
    """White where the picture has the colour of its corner, and two pixels further, without specks; grey of 8 bits."""
    pixels = np.asarray(picture).astype(int)
    like = np.abs(pixels - pixels[1, 1]).sum(-1) < LIKE
    whole = Image.fromarray(like.astype(np.uint8) * 255)
    return whole.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.MaxFilter(5))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    apple = draw(FOLDER / "apple.png", APPLE)
    mask = background(apple)
    mask.save(FOLDER / "background.png")
    with tempfile.TemporaryDirectory() as folder:
        files = ["--image", str(FOLDER / "apple.png"), "--mask", str(FOLDER / "background.png"), "--strength", "1"]
        yellow = draw(Path(folder, "yellow.png"), YELLOW, *files)
    sheet = Image.new("RGB", (3 * 192 + 2 * 8, 192), "white")
    for place, picture in enumerate((apple, mask.convert("RGB"), yellow)):
        sheet.paste(picture.resize((192, 192), Image.Resampling.LANCZOS), (place * 200, 0))
    sheet.save(FOLDER / "sheet.png", optimize=True)


if __name__ == "__main__":
    main()
