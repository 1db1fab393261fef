"""Packages of npm for tests: a folder with a package-lock.json pins each by version and digest."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def installed(folder: Path, into: Path, untested: str) -> Path:
    """A copy of the folder at `into` with its packages under node_modules.

    untested: what is not tested where there is no npm, or none of its registry. Then it skips, and fails with CI=true.
    """
    shutil.copytree(folder, into)
    lost = None if shutil.which("npm") and shutil.which("node") else "there is no npm: apt-get install npm"
    if lost is None:
        words = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        fetched = subprocess.run(words, cwd=into, capture_output=True, text=True, timeout=200)
        lost = f"npm ci: {fetched.stderr}" if fetched.returncode else None
    if lost:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{untested} not tested: {lost}")
    return into
