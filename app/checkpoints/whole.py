"""Whole: a folder that comes to stand with all of its files, or not at all.

Knows nothing of what is written into it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place at the end, and nothing is left of it on an error.

    What stood there before is gone only when the new one stands.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    before = unfinished.with_name(f"{unfinished.name}-before")
    try:
        yield unfinished
        for path in (unfinished, *unfinished.rglob("*")):  # of which two libraries would let only the owner read some
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            os.rename(folder, before)
        os.rename(unfinished, folder)
    except BaseException:
        if before.exists():
            os.rename(before, folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
