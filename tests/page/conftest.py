"""Servers, looks and visits for the tests of the page at `/`.

The browser lives as long as the tests of this folder: while it is open, other tests could not use `asyncio.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from app.api import reload
from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.page.modules import opened, serving
from tests.page.steps import arrive
from tests.parts.browser import Look, Visit, browsing
from tests.parts.servers import ALICE, BOB, ROOT, Server, bearer
from tests.parts.waiting import eventually
from tests.parts.workers import SURVEY

Visits = Callable[..., Visit]
"""`visits(look)` makes a visit that has not opened the page yet. Faults that nobody expected fail the test."""

CONTRASTS = (Look(390, dark=True, closed=True), Look(1280))
LORAS = {"ink": 'fits = ["tiny-sd3"]\ndescription = "black lines"\n', "wash": 'fits = ["tiny-sd3"]\n'}


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="package")
def sites(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Server]]:
    """Two servers with the fake worker, the tiny models and two LoRAs: an open one, and one with keys (`closed`).

    BOB's key is for tiny-dit alone.
    """
    loras, keys = tmp_path_factory.mktemp("loras"), tmp_path_factory.mktemp("keys") / "keys.toml"
    for name, text in LORAS.items():
        (loras / f"{name}.safetensors").write_text(text, encoding="utf-8")
    keys.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["tiny-dit"]\n', encoding="utf-8")
    facts = {"models": tiny, "loras": str(loras), "devices": "cpu", "preload": "all", "port": 0, "drain": 5}
    facts |= {"default_model": "tiny-sd3"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "SURVEY", SURVEY)
        closed = Settings(**facts, api_keys=f"alice={ALICE}", api_keys_file=str(keys))
        with Server(Settings(**facts)) as one, Server(closed) as other:
            for site in (one, other):
                eventually(partial(knows_loras, site.ready()))
            yield {False: one, True: other}


def knows_loras(site: Server) -> bool:
    model = httpx.get(f"{site.url}/v1/models/tiny-sd3", headers=bearer(ALICE)).json()
    return set(model["loras"]) == set(LORAS)


@pytest.fixture(scope="package")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real worker with the models that come with Instep."""
    facts = {"models": ROOT / "models", "cache": tmp_path_factory.mktemp("cache"), "preload": "emoji-mmdit"}
    with Server(Settings(**facts, devices="cpu", dtype="float32", port=0, drain=5), WORKER) as server:
        yield server.ready()


@pytest.fixture
def visits(browser: Browser, sites: dict[bool, Server]) -> Iterator[Visits]:
    made: list[Visit] = []

    def visit(look: Look, url: str = "", **options: Any) -> Visit:
        made.append(Visit(browser, url or sites[look.closed].url, look, **options))
        return made[-1]

    yield visit
    for one in made:
        one.close()
    assert [line for one in made for line in one.surprises()] == []
    assert [address for one in made for address in one.addresses if "sk-" in address] == []


@pytest.fixture(params=CONTRASTS, ids=str)
def look(request: pytest.FixtureRequest) -> Look:
    return request.param


@pytest.fixture
def visit(visits: Visits, look: Look) -> Visit:
    """The page, open, with the key where the server has keys."""
    return arrive(visits(look))


@pytest.fixture(scope="package")
def site() -> Iterator[str]:
    """The address of the page's files alone."""
    with serving() as address:
        yield address


@pytest.fixture
def tab(browser: Browser, site: str) -> Iterator[Page]:
    """An empty page, in a profile of its own."""
    with browser.new_context() as context:
        yield opened(context, site)
