"""Hints: the name that was probably meant, for an error about one that does not exist.

Knows nothing of what the names are of.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Up to `most` of the known names that `word` may be part of or a slip of; case does not count."""
    wanted, folded = word.strip().casefold()[:64], {name.casefold(): name for name in known}
    found = [name for name in folded if wanted in name] if len(wanted) > 2 else []
    return [folded[name] for name in (found or difflib.get_close_matches(wanted, folded, n=most))[:most]]


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, otherwise: str = "") -> str:
    """The end of a message: `; did you mean "this" or "that"?`, or `otherwise` where no name is near."""
    near = nearest(word, known, most)
    quoted = " or ".join(f'"{name}"' for name in near)
    return f"; did you mean {quoted}?" if near else otherwise
