"""A batch on the real worker: its requests share forwards, and each is the picture that it is alone."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.api.streams import batch, events, kinds, of_each, read
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


def test_an_engine_that_dies_costs_a_batch_time_and_no_picture(real: Server, real_http: httpx.Client) -> None:
    """Killed at the first step that is seen: both begin again and are what they would have been. Heun's sampler has
    nearly two steps for each that is asked for."""
    shape = {"model": MODEL, "prompt": "a", "size": "64x64", "sampler": "flow_heun"}
    bodies = [shape | {"num_inference_steps": steps, "seed": steps} for steps in (99, 100)]
    alone = [pixels(generate(real_http, body, "image/png").content) for body in bodies]
    asked = {"requests": [body | {"progress": True} for body in bodies]}
    found, (pid,) = [], real.supervisor.pids
    with real_http.stream("POST", "/v1/images/batch", json=asked) as reply:
        for event in read(reply.iter_lines()):
            found.append(event)
            if kinds(found[-1:]) == ["progress"] and kinds(found).count("progress") == 1:
                os.kill(pid, signal.SIGKILL)
    for lines, picture, own in zip((197, 199), alone, of_each(found, 2), strict=True):
        assert np.abs(pixels(base64.b64decode(own[-1]["b64_json"])) - picture).max() <= 1
        steps = [event["step"] for event in own if event["type"].endswith("progress")]
        assert kinds(own).count("completed") == 1 and own[-1]["timings"]["steps"] == lines
        assert steps[-lines:] == [*range(1, lines + 1)]
    assert kinds(found).count("progress") > 197 + 199
