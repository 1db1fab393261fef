"""What a Hub, or what stands in its way, may answer in the place of a list of files: one line, and nothing is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parts.commands import Run, one_line
from tests.parts.hub import Handler, Hub

Change = Callable[[list[dict[str, Any]]], Any]


def listed(path: str) -> Change:
    """A small file more, of this name."""
    digest = hashlib.sha1(b"blob 2\0{}").hexdigest()
    return lambda entries: [*entries, {"type": "file", "path": path, "size": 2, "oid": digest}]


def without(field: str) -> Change:
    return lambda entries: [{key: value for key, value in entry.items() if key != field} for entry in entries]


def with_(field: str, value: object) -> Change:
    return lambda entries: [{**entry, field: value} for entry in entries]


@pytest.mark.parametrize(
    "change",
    [
        listed("vae/a\0.json"), listed("vae/a\x1b[2J.json"), listed("vae/a\nb.json"), listed("vae/\ud800.json"),
        listed(f"vae/{'a' * 300}.json"), listed("vae/../../evil.json"), listed("/vae/evil.json"),
        without("size"), without("path"), without("oid"), with_("size", "12"), with_("size", -5), with_("size", None),
        with_("path", 7), with_("oid", 7), with_("lfs", 7), lambda entries: None, lambda entries: {"a": 1},
        lambda entries: [1, 2],
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_is_one_line(
    models: Path, hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    answer = Handler.answer

    def lie(self: Handler, status: int, body: bytes, *rest: Any, **named: Any) -> None:
        lies = "/tree/" in self.path
        answer(self, status, json.dumps(change(json.loads(body))).encode() if lies else body, *rest, **named)

    monkeypatch.setattr(Handler, "answer", lie)
    line = one_line(pull("tiny-sd3"))
    assert line == "tiny-sd3: lab/tiny: the Hub's list of files is not readable"
    assert not list((models.parent / "home").rglob("*.json"))


@pytest.mark.parametrize("body", [b"[]", b"null", b"{}", b"<html>", b"[" * 100_000])
def test_what_is_no_repository_is_one_line(
    models: Path, hub: Hub, pull: Run, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    answer = Handler.answer

    def lie(self: Handler, status: int, _: bytes, *rest: Any, **named: Any) -> None:
        answer(self, status, body, *rest, **named)

    monkeypatch.setattr(Handler, "answer", lie)
    assert one_line(pull("tiny-sd3")).startswith("tiny-sd3: lab/tiny: ")
