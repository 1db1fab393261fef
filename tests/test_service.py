"""The whole service, nothing faked: 64 clients on real sockets, the real worker, mixed models, clients that leave."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.api.test_crowd import totals
from tests.parts.servers import Server
from tests.parts.waiting import eventually
from tests.parts.workers import faulty

pytestmark = pytest.mark.slow

CLIENTS = 64
MODELS = ("tiny-sd3", "tiny-sd3-turbo", "tiny-sd3-no-t5", "tiny-dit")
GROWTH = CLIENTS * (1 << 17)
"""Bytes that front and engine process may grow by in a round: a quarter of what the planted leak keeps."""


def body(dice: random.Random) -> dict[str, object]:
    model = dice.choice(MODELS)
    condition = {"class_label": dice.randrange(10)} if model == "tiny-dit" else {"prompt": f"a {dice.random()}"}
    steps, guidance = dice.choice((1, 2, 4, 8, 12)), dice.choice((0, 1, 4.0, 7.5))
    return {"model": model, "num_inference_steps": steps, "guidance_scale": guidance, **condition}


class Crowd:
    """One round after another of 64 clients at once; a quarter of them leave before the answer."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v1/images/generations"
        self.sent = 0

    def round(self) -> Counter[str]:
        first = self.sent
        self.sent += CLIENTS
        with ThreadPoolExecutor(CLIENTS) as pool:
            return Counter(pool.map(self._client, range(first, first + CLIENTS)))

    def _client(self, number: int) -> str:
        dice = random.Random(number)
        with httpx.Client(timeout=100) as http:
            if number % 4 == 3:
                return self._leave(http, dice)
            reply = http.post(self.url, json=body(dice), headers={"Accept": "image/png"})
            assert reply.status_code == 200, reply.text
            assert Image.open(io.BytesIO(reply.content)).size == (32, 32)
            return "answered"

    def _leave(self, http: httpx.Client, dice: random.Random) -> str:
        long = {"model": "tiny-dit", "class_label": 1, "num_inference_steps": 250, "sampler": "ddpm"}
        try:
            http.post(self.url, json=long, timeout=httpx.Timeout(10, read=dice.uniform(0.05, 0.4)))
        except httpx.TimeoutException:
            return "left"
        return "answered"


@contextmanager
def service(models: Path, cache: Path, command: tuple[str, ...]) -> Iterator[Server]:
    settings = Settings(
        models=models,
        devices="cpu",
        dtype="float32",  # in bfloat16 a CPU with AMX keeps a compiled kernel of each new shape for many rounds
        preload=",".join(MODELS),
        port=0,
        drain=5,
        cache=cache,
        max_wait=1e6,
    )
    with Server(settings, command) as server:
        yield server.ready()


def resident(pid: int) -> int:
    """Bytes of memory a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def growth(rounds: int, run: Callable[[], object], *pids: int) -> float:
    """Bytes that these processes together grow by in a round of requests: the mean after two rounds that warm up."""
    sizes = []
    for _ in range(rounds):
        run()
        sizes.append(sum(resident(pid) for pid in pids))
    return (sizes[-1] - sizes[1]) / (rounds - 2)


def test_nothing_is_lost_and_memory_is_flat(tiny: Path, tmp_path: Path) -> None:
    with service(tiny, tmp_path, WORKER) as server, httpx.Client(base_url=server.url) as http:
        crowd, outcomes = Crowd(server.url), Counter[str]()
        grown = growth(6, lambda: outcomes.update(crowd.round()), server.supervisor.pids[0], os.getpid())
        eventually(lambda: server.supervisor.running + server.supervisor.waiting == 0)
        eventually(lambda: sum(totals(http).values()) == crowd.sent)
        counted = totals(http)
        assert counted["refused"] == 0 and counted["cancelled"] >= crowd.sent // 8
        assert counted["answered"] + counted["cancelled"] == outcomes["answered"] + outcomes["left"] == crowd.sent
        assert counted["answered"] >= outcomes["answered"] >= crowd.sent * 3 // 4
        gauges = [line for line in http.get("/metrics").text.splitlines() if line.startswith("instep_num_requests_")]
        assert gauges and all(line.endswith(" 0.0") for line in gauges), gauges
        assert sum(server.supervisor.queues) == 0
        assert grown < GROWTH, f"front and engine process grew by {grown} bytes a round"


def test_a_planted_leak_would_be_seen(tiny: Path, tmp_path: Path) -> None:
    with service(tiny, tmp_path, faulty("leak")) as server:
        assert growth(4, Crowd(server.url).round, server.supervisor.pids[0]) > GROWTH
