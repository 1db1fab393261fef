"""Download: files of a Hub repository into the local Hub cache; cut ones go on, each is checked by its digest.

Knows nothing of cards.

NOTE: the Hub library does the asking, but not the downloads: its own begin again after a cut, and compare sizes alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from app.checkpoints.hub import Entry, Repo, partial_of, told
from app.errors import CheckpointError

PAUSES = (0.2, 1.0, 3.0)
"""Seconds before a file is asked for again, when the last try brought nothing new."""

_AGAIN = (408, 416, 429, 500, 502, 503, 504)


def fetch(repo: Repo, path: str, tell: Callable[[int], None] = lambda count: None) -> Path:
    """One file, whole and checked; it is in the cache's blobs, and `link` shows it to readers.

    tell: called with the number of bytes that came, negative for those that were thrown away. Raises CheckpointError.
    """
    blob, size = repo.blob(path), repo.files[path].size
    if blob.is_file() and blob.stat().st_size == size:
        return blob
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(blob)
    with told(repo.name, repo.revision), partial.open("r+b" if partial.exists() else "w+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{repo.name}: {path}: another download of it is under way") from None
        arrived = _Arrival(file, repo.files[path], tell)
        _receive(repo, path, arrived)
        if not arrived.right:
            partial.unlink()
            raise CheckpointError(
                f"{repo.name}: {path}: what came is not what the Hub lists (its digest is not"
                f" {repo.files[path].digest[:12]}...): thrown away, try again"
            )
        os.replace(partial, blob)
    return blob


def link(repo: Repo, paths: Iterable[str]) -> None:
    """Show files that were fetched where the Hub library looks for them: the snapshot of the commit."""
    with told(repo.name, repo.revision):
        for path in paths:
            shown = repo.snapshot / path
            shown.parent.mkdir(parents=True, exist_ok=True)
            if not shown.exists():
                shown.unlink(missing_ok=True)  # a link to nothing
                shown.symlink_to(os.path.relpath(repo.blob(path), shown.parent))
        revision = repo.revision or constants.DEFAULT_REVISION
        if revision != repo.commit:
            ref = repo.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(repo.commit, encoding="ascii")


class _Arrival:
    """The bytes of a file that are here, and the digest of them."""

    def __init__(self, file: BinaryIO, entry: Entry, tell: Callable[[int], None]) -> None:
        self._file, self._entry, self._tell = file, entry, tell
        self._digest, self.size = self._blank(), 0
        while chunk := file.read(2**20):
            self._digest.update(chunk)
            self.size += len(chunk)
        if self.size > entry.size:
            self.restart()

    @property
    def right(self) -> bool:
        return self.size == self._entry.size and self._digest.hexdigest() == self._entry.digest

    def add(self, chunk: bytes) -> bool:
        """False where it would be more than is listed."""
        if self.size + len(chunk) > self._entry.size:
            return False
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)
        self._tell(len(chunk))
        return True

    def restart(self) -> None:
        self._tell(-self.size)
        self._file.seek(0)
        self._file.truncate()
        self._digest, self.size = self._blank(), 0

    def _blank(self) -> Any:
        if len(self._entry.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self._entry.size)


def _receive(repo: Repo, path: str, arrived: _Arrival) -> None:
    """Ask until all is there, each time for the rest; what came last is asked for once more, then it is given up."""
    size, best, failures = repo.files[path].size, arrived.size, 0
    while arrived.size < size:
        trouble = ""
        try:
            if not _ask(repo, path, arrived):
                return
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in _AGAIN:
                raise
            trouble = type(error).__name__
        failures = 0 if arrived.size > best else failures + 1
        best = max(best, arrived.size)
        if failures > len(PAUSES):
            raise CheckpointError(
                f"{repo.name}: {path}: broke off at {arrived.size} of {size} bytes ({trouble or 'no more comes'}): "
                "the same command goes on from there"
            )
        if failures:
            time.sleep(PAUSES[failures - 1])


def _ask(repo: Repo, path: str, arrived: _Arrival) -> bool:
    """One request for the rest of a file. False when more came than is listed."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if arrived.size:
        headers["Range"] = f"bytes={arrived.size}-"
    url = hf_hub_url(repo.name, path, revision=repo.commit)
    # NOTE: large files are elsewhere; the client leaves the token behind when it follows to another host.
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        if response.status_code == 416:
            arrived.restart()
        hf_raise_for_status(response)
        if arrived.size and not response.headers.get("Content-Range", "").startswith(f"bytes {arrived.size}-"):
            arrived.restart()
            if response.status_code != 200:
                return True
        return all(arrived.add(chunk) for chunk in response.iter_bytes())
