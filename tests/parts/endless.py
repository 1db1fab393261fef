"""Files that must not be read to their end: a pipe that nobody writes to, a device, a terabyte without blocks."""

from __future__ import annotations

import os
from pathlib import Path


def make_endless(file: Path, kind: str) -> None:
    """Put one in place of the file. kind: pipe, device or terabyte."""
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.touch()
        os.truncate(file, 2**40)
