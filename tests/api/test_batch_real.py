"""A batch on the real worker: its requests share forwards, and each is the picture that it is alone."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.api.streams import batch, events, kinds, of_each
from tests.parts.servers import Server, generate

pytestmark = pytest.mark.slow

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 28, 40, 50)
MODEL = "tiny-sd3"


@pytest.fixture(scope="module")
def real(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cache = tmp_path_factory.mktemp("batch-real")
    facts = Settings(models=tiny, cache=cache, preload=MODEL, devices="cpu", dtype="float32", port=0, drain=5)
    with Server(facts, WORKER) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def real_http(real: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=100) as http:
        yield http


def forwards(http: httpx.Client) -> float:
    text = http.get("/metrics").text
    (count,) = re.findall(rf'instep_denoise_step_seconds_count{{model="{MODEL}"}} ([\d.]+)', text)
    return float(count)


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)), np.int16)


def test_twelve_requests_of_1_to_50_steps_share_forwards(real_http: httpx.Client) -> None:
    """About as many as the longest alone takes, while each shows all of its own steps."""
    bodies = [
        {"model": MODEL, "prompt": f"a {steps}", "num_inference_steps": steps, "seed": steps, "guidance_scale": 1.0}
        for steps in STEPS
    ]
    alone = [pixels(generate(real_http, body, "image/png").content) for body in bodies]
    before = forwards(real_http)
    reply = batch(real_http, *[body | {"progress": True, "partial_images": 1} for body in bodies])
    shared = forwards(real_http) - before
    found = of_each(events(reply.text), len(STEPS))
    for steps, picture, own in zip(STEPS, alone, found, strict=True):
        assert [event["step"] for event in own if event["type"].endswith("progress")] == [*range(1, steps + 1)]
        assert (kinds(own)[0], kinds(own)[-1]) == ("accepted", "completed")
        assert kinds(own).count("partial_image") == (steps > 1)
        assert np.abs(pixels(base64.b64decode(own[-1]["b64_json"])) - picture).max() <= 1
    assert max(STEPS) <= shared <= max(STEPS) + 10 < sum(STEPS) / 3
