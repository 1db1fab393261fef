"""A broken device ends the engine process that has it, and costs one request: the one that breaks every device."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.parts.servers import Server
from tests.parts.workers import faulty

pytestmark = pytest.mark.slow

MODEL = "tiny-sd3-turbo"


def draw(url: str, prompt: str, **more: object) -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "seed": 1, **more}
    return httpx.post(f"{url}/v1/images/generations", json=body, headers={"Accept": "image/png"}, timeout=100)


@pytest.mark.timeout(300)
def test_a_poisoned_device_costs_the_one_that_poisons_it(device: str, tiny: Path, tmp_path: Path) -> None:
    settings = Settings(
        models=tiny, devices=device, dtype="float32", deterministic=True, preload=MODEL, port=0, cache=tmp_path
    )
    with Server(settings, faulty("poison")) as server:
        url = server.url
        server.ready()
        before, (first,) = draw(url, "a red square"), server.supervisor.pids
        with ThreadPoolExecutor(2) as clients:
            beside = clients.submit(draw, url, "a blue dog", num_inference_steps=100, sampler="flow_heun")
            while not any(server.supervisor.queues):
                assert not beside.done(), beside.result().text
                time.sleep(0.001)
            poison = clients.submit(draw, url, "poison")
            reply = poison.result()
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "crashed")
            assert beside.result().status_code == 200
        assert draw(url, "poison", seed=2).json()["error"]["code"] == "crashed"
        assert httpx.get(f"{url}/healthz").status_code == 200
        server.ready()
        after, (second,) = draw(url, "a red square"), server.supervisor.pids
        assert first != second and server.supervisor.restarts == 2
        assert before.status_code == after.status_code == 200 and before.content == after.content
        alone = draw(url, "a blue dog", num_inference_steps=100, sampler="flow_heun")
        assert alone.content == beside.result().content
