"""What tests of any folder share: tiny models, the command line, and a server with the fake worker."""

from __future__ import annotations

import gc
import ssl
from collections.abc import Iterator
from functools import cache as once
from pathlib import Path

import httpx
import pytest
import torch

from app.families.components import network_of, outline_of
from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.commands import Run, call
from tests.parts.servers import ADMIN, ALICE, BOB, Server
from tests.parts.tiny import write_models

SLOW_PATIENCE = 600
"""Seconds that a slow test may take; the others have the timeout of pyproject.toml."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_PATIENCE))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: the garbage collector skips it, as in `app.main`, and does not run meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_list_of_certificates() -> Iterator[None]:
    """Reading it takes a client 30 ms, and hundreds are made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", once(ssl.create_default_context))
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_networks() -> Iterator[None]:
    """Those of a module's folders are of no use to the next, and a hundred of them are work for the collector."""
    yield
    outline_of.cache_clear()
    network_of.cache_clear()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny models, which no test changes."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = write_cards(tmp_path_factory.mktemp("front") / "models")
    return Settings(models=folder, devices="cpu", preload="all", default_model="tiny-text", port=0, drain=5)


@pytest.fixture(scope="session")
def server(settings: Settings) -> Iterator[Server]:
    """With the fake worker, ready."""
    with Server(settings) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    return server.url


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30, verify=False) as client:
        yield client


@pytest.fixture(scope="session")
def closed(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys, ready."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["tiny-label"]\n', encoding="utf-8")
    keys = {"api_keys": f"alice={ALICE}", "api_keys_file": str(file), "admin_key": ADMIN}
    with Server(settings.model_copy(update=keys)) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of profiles for all tests, so that each shape is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("generate", "red", ...)` on the tiny models, in an empty working folder."""
    for name, value in {"MODELS": tiny, "CACHE": cache, "DEVICES": "cpu", "DTYPE": "float32", "THREADS": 1}.items():
        monkeypatch.setenv(f"INSTEP_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    return call
