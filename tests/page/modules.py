"""Modules of the page by themselves, in a real Chromium and on an empty page."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

FOLDER = Path(__file__).parents[2] / "app"


class Files(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path != "/blank":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!DOCTYPE html><title>blank</title><body></body>")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(FOLDER)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def tab(chromium: Browser, site: str) -> Iterator[Page]:
    with chromium.new_context() as context:
        yield opened(context, site)


def opened(context: BrowserContext, site: str) -> Page:
    page = context.new_page()
    page.goto(f"{site}/blank")
    return page


def run(page: Page, module: str, words: str, argument: object = None) -> Any:
    """What `words` returns, an expression in which `m` is the module and `given` the argument."""
    return page.evaluate(f"async (given) => {{ const m = await import('/page/{module}.js'); {words} }}", argument)
