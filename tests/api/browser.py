"""What a real browser shows at an address, without Playwright."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.parts.browser import OPTIONS, chromium


@dataclass(frozen=True)
class Seen:
    """The page after its scripts ran, as HTML, and what the browser had to say: errors and refusals."""

    html: str
    console: list[str]


def look(url: str, folder: Path) -> Seen:
    """The page at this address, with 20 seconds of its own time. folder: the browser's, for one call."""
    own = (f"--user-data-dir={folder}", "--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=20000")
    words = [chromium("/docs in a browser is"), "--headless", *OPTIONS, *own, "--dump-dom", url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return Seen(done.stdout, re.findall(r"CONSOLE.*?\] (.*)", done.stderr))
