"""Hints: the name that was probably meant, for an error about one that does not exist.

Knows nothing of what the names are of.
"""

from __future__ import annotations

import difflib
import heapq
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

LONGEST = 64
"""Characters of a word that are compared."""

COMPARED = 32
"""Names that difflib compares: those that share most pairs of letters with the word. It takes 10 ms for a thousand."""


class _Names:
    """Names by their folded form, and the folded names that have a pair of letters."""

    def __init__(self, known: Iterable[str]) -> None:
        self.folded = {name.casefold(): name for name in known}
        self.having: dict[str, list[str]] = {}
        for name in self.folded:
            for pair in _pairs(name):
                self.having.setdefault(pair, []).append(name)

    def alike(self, word: str) -> list[str]:
        """The folded names that share most pairs with the word, for their length."""
        shared = Counter(name for pair in _pairs(word) for name in self.having.get(pair, ()))
        return heapq.nlargest(COMPARED, shared, key=lambda name: shared[name] / (len(word) + len(name)))


def nearest(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Up to `most` of the known names that `word` may be part of or a slip of; case does not count."""
    wanted, names = word[: 4 * LONGEST].strip().casefold()[:LONGEST], _names(tuple(known))
    found = [name for name in names.folded if wanted in name] if len(wanted) > 2 else []
    found = found or difflib.get_close_matches(wanted, names.alike(wanted), n=most)
    return [names.folded[name] for name in found[:most]]


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, otherwise: str = "") -> str:
    """The end of a message: `; did you mean "this" or "that"?`, or `otherwise` where no name is near."""
    near = nearest(word, known, most)
    quoted = " or ".join(f'"{name}"' for name in near)
    return f"; did you mean {quoted}?" if near else otherwise


@lru_cache(maxsize=32)
def _names(known: tuple[str, ...]) -> _Names:
    return _Names(known)


def _pairs(word: str) -> set[str]:
    return {word[place : place + 2] for place in range(len(word) - 1)}
