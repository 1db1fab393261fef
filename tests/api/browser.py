"""A real browser that reaches this machine and nothing else, for the tests of what a page does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", OFFLINE)


@dataclass(frozen=True)
class Seen:
    """The page after its scripts ran, as HTML, and what the browser had to say: errors and refusals."""

    html: str
    console: list[str]


def look(url: str, folder: Path) -> Seen:
    """The page at this address, with 20 seconds of its own time. folder: the browser's, for one call.

    Skips where there is no Chromium, which is a failure with CI=true.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None and os.environ.get("CI"):
        pytest.fail("there is no Chromium: apt-get install chromium")
    if program is None:
        pytest.skip("there is no Chromium")
    own = (f"--user-data-dir={folder}", "--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=20000")
    words = [program, *OPTIONS, *own, "--dump-dom", url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return Seen(done.stdout, re.findall(r"CONSOLE.*?\] (.*)", done.stderr))
