"""OpenAI's client for JavaScript, unmodified: the one that `npm/package-lock.json` pins, in Node."""

from __future__ import annotations

import base64
import json
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.request import Prompt
from tests.api.test_edits import HOLE, IMAGE, MASK, PICTURE
from tests.parts.fake_worker import colour
from tests.parts.npm import installed


@pytest.fixture(scope="module")
def said(url: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the script prints."""
    here = Path(__file__).with_name("npm")
    folder = installed(here, tmp_path_factory.mktemp("npm") / "client", "OpenAI's client for JavaScript is")
    (folder / "image.png").write_bytes(IMAGE)
    (folder / "mask.png").write_bytes(MASK)
    words = ["node", "edit.mjs", url, "image.png", "mask.png"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(b64))).convert("RGB"))


@pytest.mark.slow
def test_it_edits_streams_and_varies(said: list[dict[str, Any]]) -> None:
    plain, masked, *events, varied, error = said
    assert [tuple(pixels(one["b64_json"])[0, 0]) for one in plain["data"]] == [
        colour(Prompt("a cat"), seed) for seed in (5, 6)
    ]
    assert (plain["strength"], plain["size"], plain["model"]) == (0.75, "32x32", "tiny-text")
    (behind,) = (pixels(one["b64_json"]) for one in masked["data"])
    assert (behind[~HOLE] == PICTURE[~HOLE]).all() and (behind[HOLE] == colour(Prompt("a cat"), 5)).all()
    assert [event["type"] for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert all((pixels(event["b64_json"])[~HOLE] == PICTURE[~HOLE]).all() for event in events)
    (variation,) = varied["data"]
    assert tuple(pixels(variation["b64_json"])[0, 0]) == colour(Prompt(""), variation["seed"])
    assert error == {"status": 400, "code": "invalid_value", "param": "strength"}
