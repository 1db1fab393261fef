"""What guides a request: each kind of guidance that a card may have, in a body and told back."""

from __future__ import annotations

from typing import Any

import pytest

from app.cards.card import Card, SkipLayers
from app.cards.cards import read_cards
from app.errors import InvalidValue
from app.jobs.body import read_body
from app.jobs.facts import recipe_facts
from app.request import Guidance, Recipe, SkipGuidance
from tests.parts.cards import write_cards


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return read_cards(write_cards(tmp_path_factory.mktemp("cards") / "models"))["tiny-text"]


@pytest.fixture(scope="module")
def embedded(plain: Card) -> Card:
    return plain.model_copy(update={"family": "flux", "guidance": "embedded"})


@pytest.fixture(scope="module")
def skipping(plain: Card) -> Card:
    return plain.model_copy(update={"skip_layer_guidance": SkipLayers(layers=(1,), scale=0.0)})


def ask(card: Card, **fields: Any) -> Guidance:
    return recipe(card, **fields).guidance


def recipe(card: Card, **fields: Any) -> Recipe:
    return read_body({"prompt": "a", **fields}).to_request(card, "id").recipe


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_an_embedded_scale_is_a_value_and_no_second_pass(embedded: Card, scale: float) -> None:
    asked = recipe(embedded, guidance_scale=scale)
    assert (asked.guidance.embedded, asked.guidance.guided) == (scale, False)
    assert recipe_facts(asked)["guidance_scale"] == scale and "true_cfg_scale" not in recipe_facts(asked)


def test_the_default_scale_of_an_embedded_card_is_embedded(embedded: Card) -> None:
    guidance = ask(embedded)
    assert (guidance.embedded, guidance.guided) == (embedded.defaults.guidance_scale, False)


def test_true_cfg_scale_is_classifier_free_guidance_beside_it(embedded: Card) -> None:
    asked = recipe(embedded, guidance_scale=3.5, true_cfg_scale=4, negative_prompt="b")
    assert (asked.guidance.embedded, asked.guidance.guided, asked.guidance.scale) == (3.5, True, 4.0)
    assert recipe_facts(asked).items() >= {"guidance_scale": 3.5, "true_cfg_scale": 4.0}.items()
    assert not ask(embedded, true_cfg_scale=1).guided and not ask(embedded, true_cfg_scale=0).guided


def test_skip_layer_guidance_is_off_until_it_is_asked_for(skipping: Card) -> None:
    assert ask(skipping, guidance_scale=4).skip is None
    asked = recipe(skipping, guidance_scale=4, skip_layer_guidance_scale=2.8, skip_layer_guidance_stop=0.5)
    assert asked.guidance.skip == SkipGuidance(2.8, 0.01, 0.5)
    assert recipe(skipping, **recipe_facts(asked)) == asked


def test_a_card_may_turn_it_on(plain: Card) -> None:
    card = plain.model_copy(update={"skip_layer_guidance": SkipLayers(layers=(1,), scale=2.5)})
    assert ask(card, guidance_scale=4).skip == SkipGuidance(2.5, 0.01, 0.2)
    off = recipe(card, guidance_scale=4, skip_layer_guidance_scale=0)
    assert off.passes(40) == 80 and not off.skipping(40)
    assert off.guidance.skip == SkipGuidance(0.0, 0.01, 0.2) and recipe(card, **recipe_facts(off)) == off
    assert ask(card, guidance_scale=0).skip is None


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("plain", {"true_cfg_scale": 4}, "true_cfg_scale"),
        ("plain", {"skip_layer_guidance_scale": 2.8}, "skip_layer_guidance_scale"),
        ("plain", {"skip_layer_guidance_stop": 0.2}, "skip_layer_guidance_stop"),
        ("embedded", {"guidance_scale": 31}, "guidance_scale"),
        ("embedded", {"true_cfg_scale": -1}, "true_cfg_scale"),
        ("skipping", {"skip_layer_guidance_scale": 31}, "skip_layer_guidance_scale"),
        ("skipping", {"skip_layer_guidance_start": 1.1}, "skip_layer_guidance_start"),
        ("skipping", {"skip_layer_guidance_start": 0.2}, "skip_layer_guidance_start"),
        ("skipping", {"skip_layer_guidance_stop": 0.01}, "skip_layer_guidance_stop"),
        ("skipping", {"skip_layer_guidance_scale": 2.8, "guidance_scale": 1}, "skip_layer_guidance_scale"),
    ],
)
def test_what_a_card_does_not_take_is_refused_by_name(
    kind: str, fields: dict[str, Any], param: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(InvalidValue) as refused:
        ask(request.getfixturevalue(kind), **fields)
    assert refused.value.param == param and refused.value.message.startswith(f"{param}:")
