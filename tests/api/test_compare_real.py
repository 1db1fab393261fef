"""The panel of a whole server, nothing faked: each cell is the picture that the model draws when it is asked alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.jobs.compare import PRESETS
from tests.parts.servers import generate, real_server

pytestmark = pytest.mark.slow

HAIRLINE = (0xE4, 0xE4, 0xE4)


@pytest.fixture(scope="module")
def real(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with the real worker and the tiny models."""
    with real_server(models=tiny, cache=tmp_path_factory.mktemp("compare-real")) as http:
        yield http


def cells(sheet: np.ndarray) -> list[np.ndarray]:
    """The pictures of a panel row by row: what hairlines enclose, upper left and lower right corner by corner."""
    line = (sheet == HAIRLINE).all(axis=2)
    columns = [int(x) for x in np.nonzero(line.sum(axis=0) > 200)[0]]
    rows = [int(y) for y in np.nonzero(line.sum(axis=1) > 200)[0]]
    spans = [list(zip(edges[::2], edges[1::2], strict=True)) for edges in (rows, columns)]
    return [sheet[top + 1 : below, left + 1 : right] for top, below in spans[0] for left, right in spans[1]]


def drawn(http: httpx.Client, body: dict[str, Any]) -> np.ndarray:
    """One picture asked for alone, as a cell of the panel shows it."""
    reply = generate(http, body, "image/png")
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(reply.content)).resize((256, 256), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("models", "field", "given", "rest"),
    [
        (["tiny-sd3", "tiny-sd3-turbo", "tiny-sd3-no-t5"], "prompt", ["red", "a blue car"], {"size": "48x48"}),
        (["tiny-dit", "tiny-dit-v"], "class_label", ["green", 7], {"num_inference_steps": 3, "sampler": "ddpm"}),
    ],
)
def test_a_cell_is_the_picture_of_its_model(
    real: httpx.Client, models: list[str], field: str, given: list[Any], rest: dict[str, Any]
) -> None:
    body = {field: given, "seed": 11, **rest}
    reply = real.post("/v1/images/compare", json={"models": models, **body})
    assert reply.status_code == 200, reply.text
    told = reply.json()
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"]))))
    found = cells(sheet)
    assert len(found) == len(told["cells"]) == len(models) * len(given)
    for cell, pixels in zip(told["cells"], found, strict=True):
        alone = drawn(real, {**body, "model": cell["model"], field: given[cell["row"]]})
        assert pixels.shape == alone.shape and np.abs(pixels.astype(int) - alone).max() <= 2
        assert cell["num_inference_steps"] == cell["timings"]["steps"] and cell["timings"]["denoise"] > 0
    different = {pixels.tobytes() for pixels in found}
    assert len(different) == len(found)


def test_the_preset_over_what_is_here(real: httpx.Client) -> None:
    told = real.post("/v1/images/compare", json={"preset": "two_prompts", "seed": 1}).json()
    assert told["models"] == ["tiny-sd3", "tiny-sd3-no-t5", "tiny-sd3-turbo"]
    assert [cell["prompt"] for cell in told["cells"][::3]] == PRESETS["two_prompts"]["prompt"]
    assert {(cell["timings"]["steps"], cell["guidance_scale"]) for cell in told["cells"]} == {(28, 7.0)}
    assert {text.split(": ")[0] for text in told["warnings"]} == set(told["models"])  # 24 tokens do not hold them
