"""What other servers call our fields, and what to write here for fields of theirs that have no counterpart.

The names are in `other_names.toml`.
"""

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from app.samplers.table import valid_grids

ALIKE = 0.75
"""Likeness, by difflib, from which a name counts as a slip of ours: "promt" and "szie" do, "image" and "stream" not."""

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RENAMED: dict[str, str] = _TABLES["renamed"]
OTHERWISE: dict[str, str] = _TABLES["otherwise"]
_ENDINGS = {"": "", "karras": "karras", "exponential": "exponential", "sgmuniform": "sgm_uniform", "k": "karras"}
"""The schedule of a sampler, by the end of its name elsewhere: "DPM++ 2M Karras" in A1111, "dpmpp_2m_k" in InvokeAI."""


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


def sampler_hint(name: str, known: Sequence[str]) -> str:
    """The end of a message about a sampler that does not exist: the one of `known` that does the same, with its
    schedule, or why none does; empty where neither is known."""
    wanted = _plain(name)
    for ending, schedule in _ENDINGS.items():
        bare = wanted.removesuffix(ending)
        ours = _plain(_SAMPLERS.get(bare, bare))
        for own in known:
            alike = _plain(own).removeprefix("flow").removesuffix("sd3") == ours.removeprefix("flow")
            if alike and (not schedule or schedule in valid_grids(own)):
                return f'; did you mean "{own}"' + (f' with "schedule": "{schedule}"?' if schedule else "?")
    found = [_NO_SAMPLERS[bare] for bare in map(wanted.removesuffix, _ENDINGS) if bare in _NO_SAMPLERS]
    return f"; {found[0]}" if found else ""


def _plain(name: str) -> str:
    return name[:64].casefold().translate(_PLAIN)


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {_plain(name): meant for meant, names in table.items() for name in names.split()}


_PLAIN = str.maketrans({"_": "", "-": "", " ": "", "+": "p"})
_FIELDS, _SENTENCES = _by_name(RENAMED), _by_name(OTHERWISE)
_SAMPLERS, _NO_SAMPLERS = _by_name(_TABLES["samplers"]), _by_name(_TABLES["no_samplers"])
