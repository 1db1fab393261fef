"""Search among class names; finding one is tested where bodies are (`test_schemas.py`)."""

from __future__ import annotations

import pytest

from app.cards.card import Card
from app.cards.cards import read_cards
from app.cards.catalog import find_label, search
from app.errors import InvalidValue
from app.settings import Settings


@pytest.fixture
def label(settings: Settings) -> Card:
    return read_cards(settings.models)["tiny-label"]


@pytest.mark.parametrize(
    ("query", "found"),
    [("GOLD", [1, 5]), ("tinca", [0]), ("4", [4]), ("zebra", []), ("", [0, 1, 2, 3, 4, 5]), (None, [0, 1, 2, 3, 4, 5])],
)
def test_search(label: Card, query: str | None, found: list[int]) -> None:
    assert [index for index, _ in search(label, query)] == found


def test_a_card_without_names_says_where_they_belong(label: Card) -> None:
    with pytest.raises(InvalidValue, match="id2label"):
        find_label(label.model_copy(update={"labels": ()}), 3)
