"""Hub: what a repository of the Hugging Face Hub holds at a revision, and what goes wrong with it in one line.

Knows nothing of cards or of how files are brought (download.py). The token (HF_TOKEN) goes to the Hub alone, and no
message has it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
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

from app.errors import CheckpointError

NAME_LIMIT = 255
"""Bytes of a name in a folder that file systems take."""

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as the Hub lists it. digest: sha256 of a large file, git's sha1 of a small one."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository at a revision. commit: what the revision is. folder: its own in the cache."""

    name: str
    revision: str | None
    commit: str
    files: dict[str, Entry]
    folder: Path

    @property
    def snapshot(self) -> Path:
        """The folder in which the files have their own names."""
        return self.folder / "snapshots" / self.commit

    def blob(self, path: str) -> Path:
        return self.folder / "blobs" / self.files[path].digest

    def left(self, paths: Iterable[str]) -> int:
        """Bytes of these files that are still to come."""
        wanted = {self.blob(path): self.files[path].size for path in paths}
        return sum(max(0, size - length_of(blob)) for blob, size in wanted.items())


def page(repo: str) -> str:
    """Where a user reads about a repository, and accepts the licence of a gated one."""
    return f"{constants.ENDPOINT}/{repo}"


def cache() -> Path:
    """The local Hub cache (HF_HUB_CACHE, HF_HOME)."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def open_repo(name: str, revision: str | None) -> Repo:
    """What a repository holds at a revision. Raises CheckpointError."""
    with told(name, revision):
        api = HfApi()
        commit = str(api.model_info(name, revision=revision).sha)
        listed = [one for one in api.list_repo_tree(name, revision=commit, recursive=True) if isinstance(one, RepoFile)]
        files = {one.path: Entry(one.path, one.size, one.lfs.sha256 if one.lfs else one.blob_id) for one in listed}
        if not _DIGEST.fullmatch(commit) or not all(map(_sound, files.values())):
            raise TypeError
    return Repo(name, revision, commit, files, cache() / repo_folder_name(repo_id=name, repo_type="model"))


def _sound(entry: Entry) -> bool:
    """Whether it says of a file what may be said. NOTE: digests and paths become names in the cache, and are shown."""
    names = entry.path.split("/")
    return (
        entry.path.isprintable()
        and not any(name in ("", ".", "..") or len(name.encode()) > NAME_LIMIT for name in names)
        and isinstance(entry.size, int)
        and entry.size >= 0
        and _DIGEST.fullmatch(entry.digest) is not None
    )


@contextmanager
def told(repo: str, revision: str | None) -> Iterator[None]:
    """Whatever the Hub, the way to it or the disk does: one line, as a CheckpointError."""
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("HF_HUB_OFFLINE is set: nothing can be downloaded")
    token = get_token()
    if token and not re.fullmatch("[!-~]+", token):
        raise CheckpointError("HF_TOKEN is not a token: it has characters that no token has")
    try:
        yield
    except GatedRepoError as error:
        whose = "with the account of this HF_TOKEN" if token else "and set HF_TOKEN to a token of that account"
        raise CheckpointError(f"{repo} is gated: accept its licence at {page(repo)} {whose}") from error
    except RepositoryNotFoundError as error:
        said = "there is no such repository, or this HF_TOKEN may not see it"
        raise CheckpointError(f"{repo}: {said} (look at {page(repo)})") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f'{repo}: there is no revision "{revision}"') from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo}: a file that the Hub lists is not there") from error
    except HfHubHTTPError as error:
        raise CheckpointError(_refused(repo, error.response.status_code)) from error
    except HTTPError as error:
        kind = type(error).__name__
        raise CheckpointError(f"{repo}: the Hub ({constants.ENDPOINT}) cannot be reached ({kind})") from error
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise CheckpointError(f"{repo}: {error.filename or cache()}: {what}") from error
    except (KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON of other things than were asked for
        raise CheckpointError(f"{repo}: the Hub's list of files is not readable") from error
    except ValueError as error:  # the name of a repository, or JSON
        raise CheckpointError(f"{repo}: {str(error).replace(token or '(no token)', '...')}") from error


def _refused(repo: str, status: int) -> str:
    if status == 401:
        return f"the Hub does not know this HF_TOKEN (401): make another at {page('settings/tokens')}"
    if status == 403:
        return f"{repo}: this HF_TOKEN may not read it (403): see its rights at {page('settings/tokens')}"
    return f"{repo}: the Hub answers {status}; try again later"


def partial_of(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def length_of(blob: Path) -> int:
    """Bytes of a blob that are here."""
    found = blob if blob.is_file() else partial_of(blob)
    return found.stat().st_size if found.is_file() else 0
