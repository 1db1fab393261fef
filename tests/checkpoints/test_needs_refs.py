"""Which revision of a repository is linked, when two cards need files of one commit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.checkpoints import hub

COMMIT = "a" * 40
INDEX: dict[str, Any] = {"model_index.json": None}


@pytest.mark.parametrize(("own", "shared"), [(COMMIT, None), (None, COMMIT), (COMMIT, COMMIT)])
def test_a_branch_is_linked_before_a_pinned_commit(
    own: str | None, shared: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(card: Any, _: object) -> tuple[hub.Repo, set[str]]:
        return hub.Repo("o/r", card.source.revision, COMMIT, INDEX), set()

    def card(revision: str | None, components: dict[str, str]) -> Any:
        source = SimpleNamespace(repo="o/r", revision=revision)
        return SimpleNamespace(source=source, has=lambda trait: False, components=components, files={}, variant="")

    monkeypatch.setattr(hub, "_open", opened)
    found = hub.needs(card(own, {"vae": "other/vae"}), {"other": card(shared, {})}, hub.open_repo)
    (repo, paths) = found[f"o/r@{COMMIT}"]
    assert paths == {"model_index.json"}
    assert repo.revision == (None if None in (own, shared) else COMMIT)
