"""The expressions that the condition of an alert compares and combines, found by the words of PromQL between them."""

from __future__ import annotations

import re
from collections.abc import Iterator

_COMBINES = re.compile(r"\b(?:and|or|unless)\b(?:\s*(?:on|ignoring)\s*\([^)]*\))?")
_COMPARES = re.compile(r"==|!=|<=|>=|<|>")
_NUMBER = re.compile(r"[-+]?[\d.]+(?:e[-+]?\d+)?")
_ABSENT = re.compile(r"absent\((.*)\)", re.DOTALL)


def operands(condition: str) -> Iterator[str]:
    """The parts that must have series for the condition ever to be true: no numbers, no `absent(...)` around them."""
    for side in _split(condition, _COMBINES):
        for part in _split(side, _COMPARES):
            part = part.strip()
            absent = _ABSENT.fullmatch(part)
            if not _NUMBER.fullmatch(part):
                yield absent[1] if absent else part


def _split(text: str, between: re.Pattern[str]) -> list[str]:
    """The text cut at what `between` finds outside of all brackets and quotes."""
    bare = _bare(text)
    ends = [(found.start(), found.end()) for found in between.finditer(bare)]
    starts = [0, *(end for _, end in ends)]
    return [text[start:stop] for start, stop in zip(starts, [*(start for start, _ in ends), len(text)], strict=True)]


def _bare(text: str) -> str:
    """The text with a space for everything in brackets or quotes, at its length.

    NOTE: the brackets of `on (...)` stay: they belong to the word before them.
    """
    bare, depth, quote = [], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "([{" and not quote) - (letter in ")]}" and not quote)
        inside = depth or quote or letter in "\"'"
        bare.append(letter if not inside or letter in "()" else "_")
    return "".join(bare)
