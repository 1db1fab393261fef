"""What other servers call our fields, and what to write here for fields of theirs that have no counterpart.

The names are in `other_names.toml`.
"""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path

ALIKE = 0.75
"""Likeness, by difflib, from which a name counts as a slip of ours: "promt" and "szie" do, "image" and "stream" not."""

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RENAMED: dict[str, str] = _TABLES["renamed"]
OTHERWISE: dict[str, str] = _TABLES["otherwise"]


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about a field that does not exist: the one of `known` that does the same or is nearly
    spelled so, or what to do instead; empty where there is neither."""
    wanted, fields = _plain(name), {_plain(field): field for field in known}
    found = _FIELDS.get(wanted)
    if found not in fields.values():
        if sentence := _SENTENCES.get(_plain(found or name)):
            return f"; {sentence}"
        found = next((fields[slip] for slip in difflib.get_close_matches(wanted, fields, 1, ALIKE)), None)
    return f'; did you mean "{found}"?' if found else ""


def _plain(name: str) -> str:
    return name[:64].casefold().replace("_", "").replace("-", "")


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {_plain(name): meant for meant, names in table.items() for name in names.split()}


_FIELDS, _SENTENCES = _by_name(RENAMED), _by_name(OTHERWISE)
