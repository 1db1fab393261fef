"""`instep models pull`: the files that cards name on the Hub, into the local Hub cache, for servers that ask nobody.

Knows nothing of servers or devices. The token (HF_TOKEN) is the Hub library's own matter: it is not read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import typer

from app.card import INDEX, Card
from app.cli.bodies import open_registry
from app.cli.models import Folder
from app.cli.serve import read_settings
from app.errors import CheckpointError, LoadError

_STEMS = ("diffusion_pytorch_model", "model")
_KINDS = ("*.json", "*.txt", *(f"{stem}{tail}.safetensors" for stem in _STEMS for tail in ("", "-*-of-*")))
"""The files of a part that are read: its settings, its tokenizer, its weights, whole or in shards; no variants."""


def pull(models: Folder = None) -> None:
    """Download the files of every card whose source is a Hub repository. Exit code 1 when some could not be had."""
    cards = open_registry(read_settings(models=models)).cards
    failed = []
    for card in cards.values():
        try:
            told = f"{pull_card(card, cards)} files" if card.source.repo else "beside its card"
        except CheckpointError as error:
            failed.append(error.message)
            told = "failed"
        typer.echo(f"{card.id}: {told}")
    if failed:
        raise LoadError(f"{len(failed)} of {len(cards)} models were not pulled: {'; '.join(failed)}")


def pull_card(card: Card, cards: Mapping[str, Card]) -> int:
    """Download what is missing of a card whose source is a Hub repository; the number of files it has there.

    What `card.components` takes from another card is that card's to pull, and what others take from this one is pulled.
    Raises CheckpointError, which says what to do.
    """
    # NOTE: imported late: it takes a third of a second, and this command alone needs it.
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repo, revision = str(card.source.repo), card.source.revision
    try:
        index = Path(hf_hub_download(repo, INDEX, revision=revision))
        parts = {*_parts(index, card), *_lent(card, cards)}
        files = wanted(HfApi().list_repo_files(repo, revision=revision), parts)
        # NOTE: file by file: snapshot_download would note down the whole repository, and the same function would then
        # find the cache incomplete without the files that nobody needs here.
        for file in files:
            hf_hub_download(repo, file, revision=revision)
    except GatedRepoError as error:
        raise CheckpointError(f"{card.id}: {repo}: accept its licence on the Hub, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{card.id}: {repo}: not there, or not for this HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{card.id}: {repo}: the Hub does not answer, or HF_HUB_OFFLINE is set") from error
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"{card.id}: {repo}: {type(error).__name__}: {error}") from error
    return len(files) + 1


def wanted(files: Iterable[str], parts: Iterable[str]) -> list[str]:
    """Of a repository's files, those that a server reads for these parts (folders)."""
    patterns = [f"{part}/{kind}" for part in parts for kind in _KINDS]
    # NOTE: a star of fnmatch takes a slash too.
    return sorted(file for file in files if file.count("/") == 1 and any(fnmatchcase(file, one) for one in patterns))


def _parts(index: Path, card: Card) -> set[str]:
    """The folders that an index names as this card's own."""
    named = json.loads(index.read_text(encoding="utf-8"))
    if not isinstance(named, dict):
        raise ValueError(f"{INDEX} is not a table")
    absent = (None, [None, None])
    own = {name for name, entry in named.items() if isinstance(entry, list) and entry not in absent}
    return own - set(card.components)


def _lent(card: Card, cards: Mapping[str, Card]) -> set[str]:
    """The folders of this card that the components of others name."""
    targets = [target.partition("/") for other in cards.values() for target in other.components.values()]
    return {folder for owner, _, folder in targets if owner == card.id}
