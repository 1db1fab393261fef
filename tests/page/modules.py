"""Modules of the page by themselves, on an empty page: the store, the readers, the snippets, the mask's brush."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from playwright.sync_api import BrowserContext, Page

from tests.parts.servers import ROOT

BLANK = b'<!DOCTYPE html><link rel="stylesheet" href="page/mask.css"><title>blank</title><body></body>'


class _Files(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path != "/blank":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(BLANK)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server that has the files of the page, and an empty page at /blank."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(ROOT / "app"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def opened(context: BrowserContext, site: str) -> Page:
    page = context.new_page()
    page.goto(f"{site}/blank")
    return page


def run(page: Page, module: str, words: str, given: object = None) -> Any:
    """What `words` return, the body of a function in which `m` is the module."""
    return page.evaluate(f"async (given) => {{ const m = await import('/page/{module}.js'); {words} }}", given)
