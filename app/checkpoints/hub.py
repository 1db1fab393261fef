"""The Hugging Face Hub: what a repository holds, what a card needs of it, and downloads into the local cache.

A file that was cut goes on where it stopped, and each is checked by its digest. The Hub library lists repositories, but
its own downloads begin again after a cut and compare sizes alone. The token (HF_TOKEN) goes to the Hub alone, and no
message has it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from app.cards.card import Card
from app.cards.files import INDEX, PART, STEMS, read_classes
from app.errors import CheckpointError

PAUSES = (0.2, 1.0, 3.0)
"""Seconds before a file is asked for again, when the last try brought nothing new."""

INDEX_LIMIT = 2**20

NAME_LIMIT = 255
"""Bytes of a name in a folder that file systems take."""

_ERRORS = (HTTPError, EntryNotFoundError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Of the Hub, the way to it and the disk; the last four of JSON that is something else."""

_AGAIN = (408, 416, 429, 500, 502, 503, 504)
_BIN = "diffusion_pytorch_model.bin"
_SETTINGS = re.compile(r"(?!.*\.index\.)[^/]+\.(json|txt)")
_OTHERS = re.compile(r"[^/]+\.(bin|pt|pth|ckpt|msgpack|h5|onnx)")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


Needs = dict[str, tuple["Repo", set[str]]]
"""Files that a card needs: of each repository, by name and commit, the paths."""


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository at a revision. commit: what the revision is. folder: its own in the cache."""

    name: str
    revision: str | None
    commit: str
    files: dict[str, RepoFile]
    folder: Path

    @property
    def snapshot(self) -> Path:
        """The folder in which the files have their own names."""
        return self.folder / "snapshots" / self.commit

    def blob(self, path: str) -> Path:
        """Where the cache keeps the content of a file."""
        return self.folder / "blobs" / digest_of(self.files[path])


def digest_of(file: RepoFile) -> str:
    """The sha256 of a large file, git's sha1 of a small one, as the Hub lists it."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def bytes_left(files: Iterable[tuple[Repo, Iterable[str]]]) -> int:
    """Bytes of these files that are still to come, each blob once."""
    blobs = {repo.blob(path): repo.files[path].size for repo, paths in files for path in paths}
    left = 0
    for blob, size in blobs.items():
        here = blob if blob.is_file() else _partial(blob)
        left += max(0, size - here.stat().st_size) if here.is_file() else size
    return left


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def page(repo: str) -> str:
    """The address at which a user reads about a repository, and accepts the licence of a gated one."""
    return f"{constants.ENDPOINT}/{repo}"


def cache() -> Path:
    """The local Hub cache (HF_HUB_CACHE, HF_HOME)."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def open_repo(name: str, revision: str | None) -> Repo:
    """What a repository holds at a revision. Raises CheckpointError."""
    with _explained(name, revision):
        api = HfApi()
        commit = str(api.model_info(name, revision=revision).sha)
        listed = api.list_repo_tree(name, revision=commit, recursive=True)
        files = {file.path: file for file in listed if isinstance(file, RepoFile)}
        if not _DIGEST.fullmatch(commit) or not all(map(_is_sound, files.values())):
            raise TypeError
    return Repo(name, revision, commit, files, cache() / repo_folder_name(repo_id=name, repo_type="model"))


def _is_sound(file: RepoFile) -> bool:
    """Whether these may be facts of a file. NOTE: digests and paths become names in the cache, and are shown."""
    return (
        file.path.isprintable()
        and not any(name in ("", ".", "..") or len(name.encode()) > NAME_LIMIT for name in file.path.split("/"))
        and isinstance(file.size, int)
        and file.size >= 0
        and _DIGEST.fullmatch(digest_of(file)) is not None
    )


def needs(card: Card, cards: Mapping[str, Card], opened: dict[str, Repo]) -> Needs:
    """The files of a card's own parts, and of those that it takes from other cards. Raises CheckpointError.

    opened: repositories that were asked for already; grows.
    """
    found: Needs = {}
    if card.source.repo:
        repo, own = _open(card, opened)
        _add(found, repo, own - set(card.components) | {"scheduler"}, set(card.files), card.facts.torch_files)
    for target in card.components.values():
        owner, _, folder = target.partition("/")
        if cards[owner].source.repo:
            repo, _ = _open(cards[owner], opened)
            _add(found, repo, {folder}, {folder} & set(cards[owner].files))
    return found


def _open(card: Card, opened: dict[str, Repo]) -> tuple[Repo, set[str]]:
    """The repository of a card, and the parts that its model_index.json names."""
    name, revision = str(card.source.repo), card.source.revision
    key = f"{name}@{revision}"
    if key not in opened:
        opened[key] = open_repo(name, revision)
    repo = opened[key]
    if INDEX not in repo.files or repo.files[INDEX].size > INDEX_LIMIT:
        raise CheckpointError(f"{name} has no {INDEX}, or too large a one: it is not in the diffusers layout")
    file = fetch(repo, INDEX)
    try:
        return repo, set(read_classes(file))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.message.replace(str(file), INDEX)}") from error


def _add(found: Needs, repo: Repo, parts: set[str], bare: set[str], torch: bool = False) -> None:
    for part in parts:
        if not PART.fullmatch(part):
            raise CheckpointError(f'{repo.name}: {INDEX}: "{part}" is not the name of a part')
    try:
        paths = wanted(repo.files, parts, bare, torch)
    except CheckpointError as error:
        raise CheckpointError(f"{repo.name}: {error.message}") from error
    key = f"{repo.name}@{repo.commit}"
    before, known = found.get(key, (repo, {INDEX}))
    # Of a pinned card and one that follows a branch, the branch is what `link` has to write down.
    found[key] = repo if before.revision == before.commit else before, known.union(paths)


def wanted(files: Collection[str], parts: Iterable[str], bare: Collection[str] = (), torch: bool = False) -> list[str]:
    """Of a repository's files, those that a server reads for these parts (folders): settings, tokenizers, weights.

    bare: parts whose weights are elsewhere. torch: whether diffusers' torch files will do, which `instep models
    convert` reads, for parts without safetensors; else raises CheckpointError for those.
    """
    found: list[str] = []
    for part in parts:
        names = {path.removeprefix(f"{part}/") for path in files if path.startswith(f"{part}/")}
        mine = [name for name in names if _SETTINGS.fullmatch(name)]
        if part not in bare:
            mine += _weights(part, names, torch)
        found += [f"{part}/{name}" for name in mine]
    return sorted(found)


def _weights(part: str, names: set[str], torch: bool) -> list[str]:
    """One format of a part's weights, without variants; the order is that in which app/cards/files.py looks."""
    for stem in STEMS:
        index = f"{stem}.safetensors.index.json"
        if index in names:
            shard = re.compile(rf"{stem}-\d+-of-\d+\.safetensors")
            return [index, *(name for name in names if shard.fullmatch(name))]
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
    if torch and _BIN in names:
        return [_BIN]
    others = sorted(name for name in names if _OTHERS.fullmatch(name))
    if others:
        raise CheckpointError(f"{part} has no safetensors there, only {others[0]}, which this server does not load")
    return []


def fetch(repo: Repo, path: str, tell: Callable[[int], None] = lambda count: None) -> Path:
    """One file, whole and checked; it is in the cache's blobs, and `link` shows it to readers.

    tell: called with the number of bytes that came, negative for those that were thrown away. Raises CheckpointError.
    """
    blob, file = repo.blob(path), repo.files[path]
    if blob.is_file() and blob.stat().st_size == file.size:
        return blob
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(blob)
    with _explained(repo.name, repo.revision), partial.open("r+b" if partial.exists() else "w+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{repo.name}: {path}: another download of it is under way") from None
        arrival = _Arrival(stream, file, tell)
        _receive(repo, path, arrival)
        if not arrival.right:
            partial.unlink()
            raise CheckpointError(
                f"{repo.name}: {path}: what came is not what the Hub lists (its digest is not"
                f" {digest_of(file)[:12]}...): thrown away, try again"
            )
        os.replace(partial, blob)
    return blob


def link(repo: Repo, paths: Iterable[str]) -> None:
    """Show files that were fetched where the Hub library looks for them: the snapshot of the commit."""
    with _explained(repo.name, repo.revision):
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

    def __init__(self, stream: BinaryIO, file: RepoFile, tell: Callable[[int], None]) -> None:
        self._stream, self._tell = stream, tell
        self._whole, self._wanted = file.size, digest_of(file)
        self._reset()
        while chunk := stream.read(2**20):
            self._count(chunk)
        if self.size > self._whole:
            self.restart()

    @property
    def right(self) -> bool:
        return self.size == self._whole and self._digest.hexdigest() == self._wanted

    def add(self, chunk: bytes) -> bool:
        """False where it would be more than is listed."""
        if self.size + len(chunk) > self._whole:
            return False
        self._stream.write(chunk)
        self._count(chunk)
        self._tell(len(chunk))
        return True

    def restart(self) -> None:
        self._tell(-self.size)
        self._stream.seek(0)
        self._stream.truncate()
        self._reset()

    def _count(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.size += len(chunk)

    def _reset(self) -> None:
        large = len(self._wanted) == 64
        self._digest, self.size = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % self._whole), 0


def _receive(repo: Repo, path: str, arrival: _Arrival) -> None:
    """Ask until all is there, each time for the rest; given up once nothing new came as often as there are PAUSES."""
    size, best, failures = repo.files[path].size, arrival.size, 0
    while arrival.size < size:
        trouble = "no more comes"
        try:
            if not _ask(repo, path, arrival):
                return
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in _AGAIN:
                raise
            trouble = type(error).__name__
        failures = 0 if arrival.size > best else failures + 1
        best = max(best, arrival.size)
        if failures > len(PAUSES):
            raise CheckpointError(
                f"{repo.name}: {path}: broke off at {arrival.size} of {size} bytes ({trouble}): "
                "the same command goes on from there"
            )
        if failures:
            time.sleep(PAUSES[failures - 1])


def _ask(repo: Repo, path: str, arrival: _Arrival) -> bool:
    """One request for the rest of a file. False when more came than is listed."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if arrival.size:
        headers["Range"] = f"bytes={arrival.size}-"
    url, limit = hf_hub_url(repo.name, path, revision=repo.commit), constants.HF_HUB_DOWNLOAD_TIMEOUT
    # NOTE: large files are elsewhere; the client leaves the token behind when it follows to another host.
    with get_session().stream("GET", url, headers=headers, timeout=limit, follow_redirects=True) as response:
        if response.status_code == 416:
            arrival.restart()
        hf_raise_for_status(response)
        if arrival.size and not response.headers.get("Content-Range", "").startswith(f"bytes {arrival.size}-"):
            arrival.restart()
            if response.status_code != 200:
                return True
        return all(arrival.add(chunk) for chunk in response.iter_bytes())


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn every error of the Hub, the way to it or the disk into a CheckpointError of one line."""
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("HF_HUB_OFFLINE is set: nothing can be downloaded")
    token = get_token()
    if token and not re.fullmatch("[!-~]+", token):
        raise CheckpointError("HF_TOKEN is not a token: it has characters that no token has")
    try:
        yield
    except _ERRORS as error:
        raise CheckpointError(_explain(error, repo, revision, token)) from error


def _explain(error: Exception, repo: str, revision: str | None, token: str | None) -> str:
    match error:
        case GatedRepoError():
            account = "with the account of this HF_TOKEN" if token else "and set HF_TOKEN to a token of that account"
            return f"{repo} is gated: accept its licence at {page(repo)} {account}"
        case RepositoryNotFoundError():
            return f"{repo}: there is no such repository, or this HF_TOKEN may not see it (look at {page(repo)})"
        case RevisionNotFoundError():
            return f'{repo}: there is no revision "{revision}"'
        case EntryNotFoundError():
            return f"{repo}: a file that the Hub lists is not there"
        case HfHubHTTPError():
            status, tokens = error.response.status_code, page("settings/tokens")
            if status == 401:
                return f"the Hub does not know this HF_TOKEN (401): make another at {tokens}"
            if status == 403:
                return f"{repo}: this HF_TOKEN may not read it (403): see its rights at {tokens}"
            return f"{repo}: the Hub answers {status}; try again later"
        case HTTPError():
            return f"{repo}: the Hub ({constants.ENDPOINT}) cannot be reached ({type(error).__name__})"
        case OSError():
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
            return f"{repo}: {error.filename or cache()}: {what}"
        case ValueError():  # the name of a repository, or JSON
            return f"{repo}: {str(error).replace(token or '(no token)', '...')}"
    return f"{repo}: the Hub's list of files is not readable"
