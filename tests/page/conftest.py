"""Servers and visits for the tests of the page at `/`, in a real browser.

Everything here lives as long as this folder's tests: while Playwright runs, other tests could not use `asyncio.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from app.api import reload
from app.settings import Settings
from tests.page.steps import enter_key
from tests.parts.browser import Look, Visit, browsing
from tests.parts.servers import ALICE, BOB, Server
from tests.parts.waiting import eventually
from tests.parts.workers import SURVEY, WORKER_COMMANDS

Opener = Callable[..., Visit]
"""`visit(look)` opens the page; what went wrong there fails the test at its end."""

EIGHT = [Look(width, dark, closed) for width in (390, 1280) for dark in (False, True) for closed in (False, True)]
TWO = [Look(390, dark=True, closed=True), Look(1280)]
