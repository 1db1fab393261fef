"""The Hugging Face Hub: what a repository has, what a card needs of it, and downloads into the local cache.

`huggingface_hub` lists repositories and downloads files, but compares sizes alone. So each file is downloaded beside
the cache's blobs, compared with the digest that the Hub lists, and shown to readers last. The token (HF_TOKEN) goes to
the Hub alone, and no message contains it.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token, hf_hub_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock, logging, tqdm  # type: ignore[attr-defined]

from app.cards.card import Card
from app.cards.files import BIN, INDEX, Variant, read_classes, weight_names
from app.errors import CheckpointError

NAME_LIMIT = 255
"""Bytes of a name in a folder that file systems take."""

_SETTINGS = re.compile(r"(?!.*\.index\.)[^/]+\.(json|txt)")
_OTHERS = re.compile(r"[^/]+\.(bin|pt|pth|ckpt|msgpack|h5|onnx)")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

Needs = dict[str, tuple["Repo", set[str]]]
"""The paths of the files that a card needs, with their repository, by its name and commit."""

logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # warnings have signed addresses


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository at a revision. commit: the commit of that revision. files: those of the commit, by their paths."""

    name: str
    revision: str | None
    commit: str
    files: dict[str, RepoFile]

    @property
    def folder(self) -> Path:
        """The folder of the repository in the cache."""
        return cache() / repo_folder_name(repo_id=self.name, repo_type="model")

    @property
    def snapshot(self) -> Path:
        """The folder in which the files of the commit have their own names."""
        return self.folder / "snapshots" / self.commit

    def blob(self, path: str) -> Path:
        """The file of the cache that has the content of a file."""
        return self.folder / "blobs" / digest_of(self.files[path])

    def left(self, path: str) -> int:
        """Bytes of a file that must still be downloaded: all or none."""
        blob, size = self.blob(path), self.files[path].size
        return 0 if blob.is_file() and blob.stat().st_size == size else size

    def wanted(
        self, parts: Iterable[str], bare: Iterable[str] = (), torch: bool = False, variant: Variant = ""
    ) -> list[str]:
        """The files that a server reads for these parts (folders): settings, tokenizers, weights.

        bare: parts that have their weights elsewhere. torch: whether diffusers' torch files will do, which `instep
        models convert` reads, for parts without safetensors; else raises CheckpointError for those. variant: the
        one to take of weights that come in several.
        """
        found: list[str] = []
        for part in parts:
            names = {path.removeprefix(f"{part}/") for path in self.files if path.startswith(f"{part}/")}
            mine = [name for name in names if _SETTINGS.fullmatch(name)]
            if part not in bare:
                mine += self._weights(part, names, torch, variant)
            found += [f"{part}/{name}" for name in mine]
        return sorted(found)

    def _weights(self, part: str, names: set[str], torch: bool, variant: Variant) -> list[str]:
        """One format and variant of a part's weights."""
        for index, single in weight_names(variant):
            if index in names:
                shard = re.compile(rf"{re.escape(Path(single).stem)}-\d+-of-\d+\.safetensors")
                return [index, *(name for name in names if shard.fullmatch(name))]
            if single in names:
                return [single]
        if torch and BIN in names:
            return [BIN]
        if others := sorted(name for name in names if _OTHERS.fullmatch(name)):
            only = f"only {others[0]}, which this server does not load"
            raise CheckpointError(f"{self.name}: {part} has no safetensors there, {only}")
        return []

    def fetch(self, path: str) -> Path:
        """Download a file, unless it is here, and check it. It is in the cache's blobs: `link` shows it to readers.

        Raises CheckpointError. A file that did not arrive whole, or is not what the Hub lists, is thrown away.
        """
        blob, file, incoming = self.blob(path), self.files[path], self.folder / "incoming"
        bar: Any = partial(_bar, "  downloading")
        if not self.left(path):
            return blob
        with _explained(self.name, self.revision):
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.unlink(missing_ok=True)  # of another size
            with WeakFileLock(self.folder / "incoming.lock", timeout=0.1):
                try:
                    came = hf_hub_download(self.name, path, revision=self.commit, local_dir=incoming, tqdm_class=bar)
                    if _digest(Path(came), file) != digest_of(file):
                        listed = f"what came is not what the Hub lists (its digest is not {digest_of(file)[:12]}...)"
                        raise CheckpointError(f"{self.name}: {path}: {listed}: thrown away, try again")
                    os.replace(came, blob)
                finally:
                    shutil.rmtree(incoming, ignore_errors=True)
        return blob

    def link(self, paths: Iterable[str]) -> None:
        """Show files that were fetched where the Hub library looks for them: the snapshot of the commit."""
        with _explained(self.name, self.revision):
            for path in paths:
                shown = self.snapshot / path
                shown.parent.mkdir(parents=True, exist_ok=True)
                if not shown.exists():
                    shown.unlink(missing_ok=True)  # a link to nothing
                    shown.symlink_to(os.path.relpath(self.blob(path), shown.parent))
            revision = self.revision or constants.DEFAULT_REVISION
            if revision != self.commit:
                ref = self.folder / "refs" / revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(self.commit, encoding="ascii")


def digest_of(file: RepoFile) -> str:
    """The sha256 of a large file, git's sha1 of a small one, as the Hub lists it."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _digest(file: Path, listed: RepoFile) -> str:
    """The digest of a downloaded file, of the kind that the Hub lists for it."""
    digest = hashlib.sha256() if listed.lfs else hashlib.sha1(b"blob %d\0" % listed.size)
    with file.open("rb") as stream, _bar("  checking", total=listed.size, unit="B", unit_scale=True) as bar:
        while chunk := stream.read(2**20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _bar(doing: str, **options: Any) -> Any:
    """A bar for the bytes of a file, in a terminal only. It is gone when the file is done."""
    return tqdm(**{**options, "desc": doing, "leave": False, "disable": None})  # type: ignore[no-untyped-call]


def bytes_left(files: Iterable[tuple[Repo, Iterable[str]]]) -> int:
    """Bytes of these files that must still be downloaded, each blob once."""
    return sum({repo.blob(path): repo.left(path) for repo, paths in files for path in paths}.values())


def page(repo: str) -> str:
    """The address at which a user reads about a repository, and accepts the licence of a gated one."""
    return f"{constants.ENDPOINT}/{repo}"


def cache() -> Path:
    """The local Hub cache (HF_HUB_CACHE, HF_HOME)."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def open_repo(name: str, revision: str | None) -> Repo:
    """What a repository has at a revision. Raises CheckpointError."""
    with _explained(name, revision):
        api = HfApi()
        commit = str(api.model_info(name, revision=revision).sha)
        listed = api.list_repo_tree(name, revision=commit, recursive=True)
        files = {file.path: file for file in listed if isinstance(file, RepoFile)}
        if not _DIGEST.fullmatch(commit) or not all(map(_is_sound, files.values())):
            raise TypeError
    return Repo(name, revision, commit, files)


def _is_sound(file: RepoFile) -> bool:
    """Whether these may be facts of a file. NOTE: digests and paths become names in the cache, and are shown."""
    return (
        file.path.isprintable()
        and not any(name in ("", ".", "..") or len(name.encode()) > NAME_LIMIT for name in file.path.split("/"))
        and isinstance(file.size, int)
        and file.size >= 0
        and _DIGEST.fullmatch(digest_of(file)) is not None
    )


def needs(card: Card, cards: Mapping[str, Card], opened: Callable[[str, str | None], Repo]) -> Needs:
    """The files of a card's own parts, and of those that it takes from other cards. Raises CheckpointError.

    opened: `open_repo`, or a cache of it, which asks for each repository once.
    """
    found: Needs = {}
    shared = (target.partition("/") for target in card.components.values())
    for owner, part in ((card, ""), *((cards[owner], folder) for owner, _, folder in shared)):
        if not owner.source.repo:
            continue
        repo, named = _open(owner, opened)
        parts = {part} if part else named - set(card.components) | {"scheduler"}
        torch = not part and card.has("torch_files")
        paths = repo.wanted(parts, owner.files, torch=torch, variant=owner.variant)
        key = f"{repo.name}@{repo.commit}"
        before, known = found.get(key, (repo, {INDEX} & repo.files.keys()))
        # Of a pinned card and one that follows a branch, the branch is what `link` has to write down.
        found[key] = repo if before.revision == before.commit else before, known.union(paths)
    return found


def _open(card: Card, opened: Callable[[str, str | None], Repo]) -> tuple[Repo, set[str]]:
    """The repository of a card, and the parts that its model_index.json names.

    If the repository has only the card's own parts, the model_index.json beside the card names them.
    """
    repo, beside = opened(str(card.source.repo), card.source.revision), card.folder / INDEX
    if INDEX not in repo.files and not (beside.is_file() and _has_parts(repo, beside, card)):
        raise CheckpointError(f"{repo.name} has no {INDEX}: it is not in the diffusers layout")
    file = repo.fetch(INDEX) if INDEX in repo.files else beside
    try:
        return repo, set(read_classes(file))
    except CheckpointError as error:
        raise CheckpointError(f"{repo.name}: {error.message.replace(str(file), INDEX)}") from error


def _has_parts(repo: Repo, index: Path, card: Card) -> bool:
    """Whether the repository has every part of this index that the card does not take from other cards."""
    return {path.partition("/")[0] for path in repo.files} >= read_classes(index).keys() - card.components.keys()


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
    except CheckpointError:
        raise
    except Exception as error:  # whatever an answer makes of the Hub library
        raise CheckpointError(f"{repo}{_explain(error, repo, revision, token)}") from error


def _explain(error: BaseException, repo: str, revision: str | None, token: str | None) -> str:
    """The end of a line that begins with the repository's name."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # why the Hub library had to look for the file here
    words = " ".join(str(error).split())[:200].replace(token or "(no token)", "...")
    match error:
        case errors.GatedRepoError():
            account = "with the account of this HF_TOKEN" if token else "and set HF_TOKEN to a token of that account"
            return f" is gated: accept its licence at {page(repo)} {account}"
        case errors.RepositoryNotFoundError():
            return f": there is no such repository, or this HF_TOKEN may not see it (look at {page(repo)})"
        case errors.RevisionNotFoundError():
            return f': there is no revision "{revision}"'
        case errors.EntryNotFoundError():
            return ": a file that the Hub lists is not there"
        case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
            why = "does not know this HF_TOKEN" if response.status_code == 401 else "does not let this HF_TOKEN read it"
            tokens = page("settings/tokens")
            return f": the Hub {why} ({response.status_code}): make another, or see its rights, at {tokens}"
        case errors.HfHubHTTPError():
            return f": the Hub answers {error.response.status_code}; try again later"
        case errors.HTTPError():  # type: ignore[attr-defined]
            again = "the same command goes on with what is missing"
            return f": the connection to the Hub ({constants.ENDPOINT}) failed ({type(error).__name__}): {again}"
        case TimeoutError():  # of the lock
            return ": another download of it is under way"
        case OSError() if error.errno:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return f": {error.filename or cache()}: {'the disk is full' if full else error.strerror}"
        case OSError() | RuntimeError():  # a length that is not the listed one; the Hub's storage library
            return f": the download failed ({words})"
        case ValueError():  # the name of a repository, or JSON
            return f": {words}"
    return ": the Hub's list of files is not readable"
