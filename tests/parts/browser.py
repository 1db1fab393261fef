"""A real browser that reaches this machine and nothing else, and visits of pages that must have no faults."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", OFFLINE)
PATIENCE = 30_000
"""Milliseconds after which an element is not waited for any longer."""

BLOBS = """
window.blobUrls = new Set();
const create = URL.createObjectURL.bind(URL), revoke = URL.revokeObjectURL.bind(URL);
URL.createObjectURL = (blob) => { const url = create(blob); blobUrls.add(url); return url; };
URL.revokeObjectURL = (url) => { blobUrls.delete(url); revoke(url); };
"""
"""Counts the addresses of blobs that were made and not revoked."""


def chromium(untested: str) -> str:
    """The program. untested: what is not tested without it. Then it skips, and fails with CI=true."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        fail = pytest.fail if os.environ.get("CI") else pytest.skip
        fail(f"{untested} not tested: there is no Chromium: apt-get install chromium")
    return str(program)


@contextmanager
def browsing(untested: str = "the page at / is") -> Iterator[Browser]:
    """A Chromium that Playwright steers.

    While it is open this thread counts as one with a running event loop, so `asyncio.run` must wait for its end.
    """
    program = chromium(untested)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(OPTIONS))
        yield browser
        browser.close()


@dataclass(frozen=True)
class Look:
    """How a person sees the page. closed: on a server with keys."""

    width: int = 1280
    dark: bool = False
    closed: bool = False

    def __str__(self) -> str:
        return f"{self.width}-{'dark' if self.dark else 'light'}-{'key' if self.closed else 'open'}"

    @property
    def options(self) -> dict[str, Any]:
        """Of a browser's context: a phone below 600 pixels, with touch, else a desktop."""
        phone = self.width < 600
        return {
            "viewport": {"width": self.width, "height": 844 if phone else 800},
            "has_touch": phone,
            "is_mobile": phone,
            "color_scheme": "dark" if self.dark else "light",
        }


class Visit:
    """A page in a profile of its own, and what went wrong there.

    faults: errors and warnings of the console, exceptions, requests that failed or went to another host, one line each.
    addresses: of all requests. expected: patterns of faults that the test brings about itself.
    """

    def __init__(self, browser: Browser, url: str, look: Look, **options: Any) -> None:
        self.url, self.look = url, look
        self.faults: list[str] = []
        self.addresses: list[str] = []
        self.expected: list[str] = []
        self._open: set[Request] = set()
        self.context = browser.new_context(**look.options, locale="en-GB", **options)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.context.set_default_timeout(PATIENCE)
        self.context.add_init_script(BLOBS)
        self.context.on("request", self._sent)
        self.context.on("requestfinished", lambda one: self._open.discard(one))
        self.context.on("requestfailed", self._failed)
        self.context.on("console", self._console)
        self.context.on("weberror", lambda one: self.faults.append(f"exception: {one.error}"))
        self.page: Page = self.context.new_page()

    def _failed(self, request: Request) -> None:
        """NOTE: a stream that a script reads to its end piece by piece counts as aborted, as often as not. So does a
        preview after which the next one comes at once."""
        self._open.discard(request)
        expected = request.method == "POST" or request.url.startswith("blob:")
        if not expected or request.failure != "net::ERR_ABORTED":
            self.faults.append(f"failed: {request.url[:200]} {request.failure}")

    def _sent(self, request: Request) -> None:
        self._open.add(request)
        self.addresses.append(request.url)
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data") and f"{parts.scheme}://{parts.netloc}" != self.url:
            self.faults.append(f"another host: {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text} {message.location.get('url', '')}")

    def open(self, path: str = "/") -> Page:
        self.page.goto(self.url + path)
        return self.page

    def expect(self, *patterns: str) -> None:
        """Faults with one of these in them are the test's own."""
        self.expected.extend(patterns)

    def surprises(self) -> list[str]:
        """The faults that nobody expected."""
        return [line for line in self.faults if not any(re.search(pattern, line) for pattern in self.expected)]

    def blobs(self) -> int:
        """How many addresses of blobs are open."""
        return int(self.page.evaluate("blobUrls.size"))

    def settle(self) -> None:
        """Wait until every request has ended."""
        until = time.monotonic() + PATIENCE / 1000
        while self._open:
            assert time.monotonic() < until, [one.url for one in self._open]
            self.page.wait_for_timeout(10)

    def reload(self) -> None:
        """Load the page again, once every request has ended."""
        self.settle()
        self.page.reload()

    def close(self) -> None:
        """Leave, once every request has ended."""
        self.settle()
        self.context.close()
