"""The one "did you mean": parts and slips of names, in any case, no more of them than asked for."""

from __future__ import annotations

import pytest

from app.cards.catalog import did_you_mean, nearest

NAMES = ("goldfish", "Golden Retriever", "gold", "crane")


@pytest.mark.parametrize(
    ("word", "most", "found"),
    [
        ("GOLD", 1, ["goldfish"]),
        ("gold", 9, ["goldfish", "Golden Retriever", "gold"]),
        ("retriever ", 3, ["Golden Retriever"]),
        ("golden retreiver", 1, ["Golden Retriever"]),
        ("crame", 3, ["crane"]),
        ("r", 3, []),
        ("", 3, []),
        ("zebra", 3, []),
        ("x" * 99_999, 3, []),
    ],
)
def test_nearest(word: str, most: int, found: list[str]) -> None:
    assert nearest(word, NAMES, most) == found


def test_the_end_of_a_message() -> None:
    assert did_you_mean("gold", NAMES, most=2) == '; did you mean "goldfish" or "Golden Retriever"?'
    assert did_you_mean("zebra", NAMES, otherwise="; there are four") == "; there are four"
    assert did_you_mean("zebra", NAMES) == ""
