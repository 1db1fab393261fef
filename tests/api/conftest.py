"""One server with the fake worker for all tests of the front: real sockets, real processes, no torch."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.cards.card import read_cards
from app.main import configured, create_app
from app.metrics import Metrics
from app.settings import Settings
from app.worker.supervisor import WORKER, Supervisor

FAKE = (sys.executable, str(Path(__file__).parent.parent / "fake_worker.py"))
LABELS = ["tench, Tinca tinca", "goldfish", "crane", "house finch", "crane", "golden retriever"]
ALICE, BOB, ADMIN = ("sk-alice-0123456789", "sk-bob-9876543210", "sk-admin-0011223344")
"""Keys of the closed server: one for every model, one for tiny-label alone, one for everything."""

TEXT = """
id = "tiny-text"
family = "sd3"
source = { path = "." }
aliases = ["gpt-image-1"]
license = "apache-2.0"
gated = true
parameters = 6_543_210
bytes = 13_000_000
schedule = { kind = "flow", shift = 3.0 }
defaults = { sampler = "flow_euler", num_inference_steps = 4, guidance_scale = 3.0, size = "32x32" }
limits.sizes = { min = 16, max = 64, multiple = 16 }
limits.num_inference_steps = 50
limits.guidance_scale = 20.0
limits.n = 4
limits.prompt = 200
text = { clip = 16, t5 = 24 }
"""
LABEL = """
id = "tiny-label"
family = "dit"
source = { path = "." }
schedule = { kind = "diffusion", spacing = "linspace", variance = "learned_range" }
defaults = { sampler = "ddpm", num_inference_steps = 4, guidance_scale = 4.0, size = "32x32" }
limits = { num_inference_steps = 20, sizes = { min = 32, max = 32, multiple = 32, square = true }, n = 4 }
"""


def write_cards(folder: Path) -> Path:
    """The cards of both kinds of model, without weights: the fake worker needs none."""
    for name, text in (("tiny-text", TEXT), ("tiny-label", LABEL)):
        (folder / name).mkdir(parents=True)
        (folder / name / "card.toml").write_text(text, encoding="utf-8")
    index = {"id2label": {str(i): name for i, name in enumerate(LABELS)}}
    (folder / "tiny-label" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = write_cards(tmp_path_factory.mktemp("front") / "models")
    return Settings(models=folder, devices="cpu", preload="all", default_model="tiny-text", port=0, drain=5)


class Server:
    """A real uvicorn on a loopback port, in a thread of its own, around a fake worker in a process of its own."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = FAKE) -> None:
        self.metrics = Metrics()
        cards = read_cards(settings.models)
        self.supervisor = Supervisor(settings.without_secrets(), cards, observe=self.metrics.observe, command=command)
        self.app = create_app(settings, supervisor=self.supervisor, metrics=self.metrics)
        self.uvicorn = uvicorn.Server(configured(self.app, settings))
        self._thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def start(self) -> str:
        self._thread.start()
        until = time.monotonic() + 100
        while not self.uvicorn.started:
            assert self._thread.is_alive() and time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self.url

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def real_server(**settings: object) -> Iterator[httpx.Client]:
    """A client of a server with the real worker on a CPU, once it is ready.

    float32: in bfloat16, which a server takes where a processor has it, who shares a batch may show by a level more.
    """
    server = Server(Settings(devices="cpu", dtype="float32", port=0, drain=5, **settings), WORKER)
    url = server.start()
    try:
        eventually(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        with httpx.Client(base_url=url, timeout=100) as http:
            yield http
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(settings: Settings) -> Iterator[Server]:
    server = Server(settings)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    base = server.start()
    eventually(lambda: httpx.get(f"{base}/readyz").status_code == 200)
    return base


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30, verify=False) as client:
        yield client


@pytest.fixture(scope="session")
def closed(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, started."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["tiny-label"]\n', encoding="utf-8")
    keys = {"api_keys": f"alice={ALICE}", "api_keys_file": str(file), "admin_key": ADMIN}
    server = Server(settings.model_copy(update=keys))
    base = server.start()
    eventually(lambda: httpx.get(f"{base}/readyz").status_code == 200)
    yield server
    server.stop()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def generate(http: httpx.Client, body: dict[str, object], accept: str = "application/json") -> httpx.Response:
    return http.post("/v1/images/generations", json=body, headers={"Accept": accept})


def eventually(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
