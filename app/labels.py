"""Labels: the class names of a checkpoint, from `id2label` of its model_index.json.

Knows nothing of cards or tensors, and asks nobody: of a Hub repository it sees what the local cache holds.
"""

from __future__ import annotations

import json
from pathlib import Path

from app.errors import CardError


def cached_index(repo: str, revision: str | None) -> Path | None:
    """model_index.json of a Hub repository's snapshot in the local cache; None while it is not downloaded."""
    # NOTE: imported late, by cards that name a repository alone: it takes a third of a second.
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    except ValueError:  # no name of a repository: its load says so
        return None
    return Path(found) if isinstance(found, str) else None


def read_labels(index: Path) -> tuple[str, ...]:
    """The class names in order of id, none without `id2label`. Raises CardError unless the ids are 0 to n - 1."""
    try:
        named = json.loads(index.read_text(encoding="utf-8")).get("id2label") or {}
        labels = tuple(named[str(number)] for number in range(len(named)))
    except KeyError as error:
        raise CardError(f"{index}: id2label: {len(named)} classes, but none has the id {error.args[0]}") from error
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CardError(f"{index}: id2label: {error}") from error
    if not all(isinstance(label, str) for label in labels):
        raise CardError(f"{index}: id2label: a name that is not a text")
    return labels
