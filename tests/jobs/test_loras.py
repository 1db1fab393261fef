"""`loras` of a body: what becomes of it in a recipe, what is refused, and what is shown of it again."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.cards.card import Card
from app.cards.cards import read_cards
from app.errors import InvalidValue
from app.imaging import a1111
from app.jobs.body import read_body
from app.jobs.facts import recipe_facts
from app.jobs.schema import body_schema
from app.request import Recipe
from tests.parts.cards import adapter, with_adapters, write_cards
from tests.parts.requests import refused


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """A card that ink, wash and watercolor fit, beside one LoRA that fits another and one that fits none."""
    card = read_cards(write_cards(tmp_path_factory.mktemp("cards") / "models"))["tiny-text"]
    fitting = [adapter(name, "tiny-text") for name in ("watercolor", "ink", "wash")]
    return with_adapters(card, *fitting, adapter("alien", "other", "more"), adapter("dora", problem="it is a DoRA"))


def recipe(card: Card, *loras: Any, **fields: Any) -> Recipe:
    body = read_body({"prompt": "a", "loras": list(loras), **fields})
    return body.to_request(card, "id", adapters=card.adapters).recipe


def test_they_are_sorted_and_a_weight_of_0_is_left_out(card: Card) -> None:
    asked = {"name": "watercolor", "weight": 0.8}, {"name": "ink"}, {"name": "wash", "weight": 0}
    assert recipe(card, *asked).adapters == (("ink", 1.0), ("watercolor", 0.8))
    plain = read_body({"prompt": "a"}).to_request(card, "id", adapters=card.adapters).recipe
    assert recipe(card) == recipe(card, {"name": "ink", "weight": -0.0}) == plain and plain.adapters == ()
    assert recipe(card, asked[0]).key == plain.key, "they share forwards"


@pytest.mark.parametrize(
    ("loras", "field", "said"),
    [
        ({"name": "ink"}, "loras", "expects a list"),
        (["ink"], "loras.0", "expects a JSON object"),
        ([{"weight": 1}], "loras.0.name", "is required"),
        ([{"name": 7}], "loras.0.name", "expects a string"),
        ([{"name": "ink", "scale": 1}], "loras.0.scale", "is an unknown field"),
        ([{"name": "ink", "weight": "1"}], "loras.0.weight", "expects a number from -2 to 2"),
        ([{"name": "ink", "weight": True}], "loras.0.weight", "expects a number from -2 to 2"),
        ([{"name": "ink"}, {"name": "wash", "weight": 2.01}], "loras.1.weight", "expects a number from -2 to 2"),
        ([{"name": "ink", "weight": float("nan")}], "loras.0.weight", "expects a number from -2 to 2"),
        ([{"name": f"a{number}"} for number in range(9)], "loras", "expects at most 8 entries, not 9"),
        ([{"name": "ink"}, {"name": "ink"}], "loras.1.name", "ink is named twice"),
        ([{"name": "ink"}, {"name": "inc"}], "loras.1.name", 'there is no LoRA "inc"; did you mean "ink"?'),
        ([{"name": "x/../y"}], "loras.0.name", 'no LoRA "x/../y"; tiny-text takes watercolor, ink, wash'),
        ([{"name": "https://x.y"}], "loras.0.name", "there is no LoRA"),
        ([{"name": "alien"}], "loras.0.name", "alien does not fit tiny-text; it fits other, more"),
        ([{"name": "dora"}], "loras.0.name", "dora does not fit tiny-text; it cannot be used: it is a DoRA"),
    ],
)
def test_what_is_refused(card: Card, loras: object, field: str, said: str) -> None:
    with pytest.raises(InvalidValue, match=f"^{field}: ") as error:
        read_body({"prompt": "a", "loras": loras}).to_request(card, "id", adapters=card.adapters)
    assert said in error.value.message and error.value.param == field


def test_where_there_are_none_the_error_says_so(card: Card) -> None:
    with refused("invalid_value", '^loras.0.name: there is no LoRA "ink"; tiny-text takes none of those here$'):
        recipe(with_adapters(card), {"name": "ink"})


def test_the_schema_of_a_card_takes_what_the_body_takes(card: Card) -> None:
    schema = Draft202012Validator(body_schema(card, card.names, True, card.adapters))
    for loras in ([], None, [{"name": "ink"}], [{"name": "ink", "weight": -2}, {"name": "wash", "weight": 2}]):
        assert schema.is_valid({"prompt": "a", "loras": loras}), loras
    for wrong in ({}, ["ink"], [{"name": "alien"}], [{"name": "ink", "weight": 2.1}], [{"name": "ink"}] * 9):
        assert not schema.is_valid({"prompt": "a", "loras": wrong}), wrong
    none = Draft202012Validator(body_schema(with_adapters(card), card.names, True))
    assert none.is_valid({"prompt": "a", "loras": []}) and not none.is_valid(
        {"prompt": "a", "loras": [{"name": "ink"}]}
    )


def test_the_facts_of_a_recipe_ask_for_it_again(card: Card) -> None:
    first = recipe(card, {"name": "watercolor", "weight": 0.8}, {"name": "ink", "weight": -1}, seed=1)
    facts = recipe_facts(first)
    assert facts["loras"] == [{"name": "ink", "weight": -1.0}, {"name": "watercolor", "weight": 0.8}]
    assert read_body({"prompt": "a", **facts}).to_request(card, "id", adapters=card.adapters).recipe == first
    assert "loras" not in recipe_facts(recipe(card))


def test_the_line_of_a1111_ends_its_prompt_with_them(card: Card) -> None:
    facts = {"prompt": "a cat", "negative_prompt": "dog"} | recipe_facts(recipe(card, {"name": "ink", "weight": 0.8}))
    assert a1111(facts).splitlines()[:2] == ["a cat <lora:ink:0.8>", "Negative prompt: dog"]
    assert a1111({"prompt": "a cat"}).startswith("a cat\n")
