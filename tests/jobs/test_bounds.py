"""Bounds of a field: what is documented for a card is what the check of a body takes, for every shipped card."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from app.cards.card import Card
from app.cards.cards import read_cards
from app.errors import InvalidValue
from app.jobs.body import bounds, most_steps_of, read_body
from app.jobs.schema import body_schema
from app.samplers.table import compile_table, valid_samplers

CARDS = read_cards(Path(__file__).parents[2] / "models")
PAIRS = [(card, sampler) for card in CARDS.values() for sampler in valid_samplers(card.schedule)]


def body(card: Card, **fields: object) -> dict[str, object]:
    return {"model": card.id, **({"class_label": 0} if card.draws_classes else {"prompt": "a"}), **fields}


@pytest.mark.parametrize(("card", "sampler"), PAIRS, ids=[f"{card.id}-{sampler}" for card, sampler in PAIRS])
def test_the_documented_most_steps_are_taken_and_one_more_is_not(card: Card, sampler: str) -> None:
    card = card.model_copy(update={"labels": ("cat",)}) if card.draws_classes else card
    schema = Draft202012Validator(body_schema(card, (card.id,), True))
    most = most_steps_of(card)[sampler]
    fits = body(card, sampler=sampler, num_inference_steps=most)
    recipe = read_body(fits).to_request(card, "id").recipe
    assert recipe.steps == most and schema.is_valid(fits)
    assert compile_table(card.schedule, sampler, most, tokens=1).lines >= most
    over = {**fits, "num_inference_steps": most + 1}
    assert not schema.is_valid(over)
    with pytest.raises(InvalidValue, match=f"num_inference_steps: expects 1 to {most}"):
        read_body(over).to_request(card, "id")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_both_ends_of_every_range_are_taken_and_nothing_beyond(card: Card) -> None:
    card = card.model_copy(update={"labels": ("cat",)}) if card.draws_classes else card
    schema = Draft202012Validator(body_schema(card, (card.id,), True))
    spans = {field: (span["minimum"], span["maximum"]) for field, span in bounds(card).items() if "minimum" in span}
    assert {"n", "seed", "guidance_scale", "deadline"} <= spans.keys()
    for field, (low, high) in spans.items():
        assert schema.is_valid(body(card, **{field: low})) and schema.is_valid(body(card, **{field: high}))
        for outside in (low - 1, high + 1):
            assert not schema.is_valid(body(card, **{field: outside}))
            with pytest.raises(InvalidValue, match=f"^{field}: "):
                read_body(body(card, **{field: outside})).to_request(card, "id")


def test_a_sampler_with_less_room_has_its_own_bound() -> None:
    card = CARDS["dit-xl-2-256"]
    assert most_steps_of(card)["dpmpp_2m"] == 999 and most_steps_of(card)["ddim"] == 1000
