"""Bodies become requests: defaults, limits, and errors that name field and range."""

from __future__ import annotations

import time
from typing import Any

import pytest

from app.cards.card import Card, Sizes
from app.cards.cards import read_cards
from app.errors import Code, InvalidValue
from app.jobs.body import SEEDS, ImageBody, read_body
from app.keys import NOBODY, ApiKey
from app.request import ClassLabel, Delivery, Guidance, Prompt, Recipe, Request
from tests.parts.cards import write_cards
from tests.parts.requests import refused


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Card]:
    return read_cards(write_cards(tmp_path_factory.mktemp("cards") / "models"))


@pytest.fixture
def text(cards: dict[str, Card]) -> Card:
    return cards["tiny-text"]


@pytest.fixture
def label(cards: dict[str, Card]) -> Card:
    return cards["tiny-label"]


def ask(card: Card, **fields: Any) -> Request:
    return read_body(fields).to_request(card, "id")


def test_defaults_come_from_the_card(text: Card) -> None:
    request = ask(text, prompt="a cat")
    assert request.images[0].condition == Prompt("a cat", None)
    assert request.recipe == Recipe("tiny-text", 32, 32, "flow_euler", 4, Guidance(3.0), 24)
    assert request.delivery == Delivery(NOBODY.name, NOBODY.weight)
    assert 0 <= request.images[0].seed < 2**32


def test_what_is_asked_is_taken(text: Card) -> None:
    before = time.monotonic()
    request = ask(
        text, prompt="a", negative_prompt="b", n=2, size="64x16", num_inference_steps=7, guidance_scale=1.5, seed=5,
        sampler="flow_heun", max_sequence_length=8, priority=3, deadline=60, stream=True, partial_images=2,
    )  # fmt: skip
    assert [(spec.condition, spec.seed) for spec in request.images] == [(Prompt("a", "b"), 5), (Prompt("a", "b"), 6)]
    assert request.recipe == Recipe("tiny-text", 64, 16, "flow_heun", 7, Guidance(1.5), 8)
    assert (request.delivery.priority, request.delivery.previews) == (3, 2)
    assert request.delivery.deadline is not None and before + 59 < request.delivery.deadline < before + 62


def test_whose_it_is_and_the_highest_priority_come_from_the_key(text: Card) -> None:
    key = ApiKey("alice", weight=2.5, priority=-1)
    request = read_body({"prompt": "a", "priority": 7}).to_request(text, "id", key)
    assert (request.delivery.tenant, request.delivery.weight, request.delivery.priority) == ("alice", 2.5, -1)
    assert read_body({"prompt": "a", "priority": -3}).to_request(text, "id", key).delivery.priority == -3


@pytest.mark.parametrize(
    ("fields", "patience", "seconds"),
    [
        ({"deadline": 60}, 20.0, 20),
        ({"deadline": 60}, 100.0, 60),
        ({}, 20.0, 20),
        ({"stream": True}, 20.0, None),
        ({"stream": True, "deadline": 60}, 20.0, 60),
        ({}, None, None),
    ],
)
def test_the_earlier_of_deadline_and_patience_holds(
    text: Card, fields: dict[str, Any], patience: float | None, seconds: int | None
) -> None:
    before = time.monotonic()
    deadline = read_body({"prompt": "a", **fields}).to_request(text, "id", patience=patience).delivery.deadline
    if seconds is None:
        assert deadline is None
    else:
        assert deadline is not None and before + seconds <= deadline < before + seconds + 5


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.0])
def test_guidance_of_one_or_less_is_none_at_all(text: Card, scale: float) -> None:
    request = ask(text, prompt="a", guidance_scale=scale)
    assert (request.recipe.guidance.guided, request.recipe.guidance.scale) == (False, scale)


def test_null_is_absent(text: Card) -> None:
    every = dict.fromkeys(ImageBody.model_fields)
    assert ask(text, **{**every, "prompt": "a", "seed": 1}) == ask(text, prompt="a", seed=1)


def test_fields_of_openai_that_are_not_served_are_ignored(text: Card) -> None:
    body = {"quality": "hd", "background": "transparent", "moderation": "low", "style": "vivid", "user": "me"}
    body |= {"safety_identifier": "x", "complexity": 3, "response_format": "b64_json", "size": "auto"}
    assert ask(text, prompt="a", seed=1, **body) == ask(text, prompt="a", seed=1)


def test_a_list_of_prompts_is_one_image_each_and_seeds_count_up(text: Card) -> None:
    images = ask(text, prompt=["a", "b", "c"], seed=10).images
    assert [(spec.condition, spec.seed) for spec in images] == [(Prompt("a"), 10), (Prompt("b"), 11), (Prompt("c"), 12)]


def test_the_last_seed_is_followed_by_the_first(text: Card) -> None:
    assert [spec.seed for spec in ask(text, prompt="a", n=2, seed=SEEDS - 1).images] == [SEEDS - 1, 0]


@pytest.mark.parametrize("seed", [-1, -1.0])
def test_a_seed_of_minus_one_is_any_seed(text: Card, seed: float) -> None:
    """As A1111, ComfyUI's clients and those after them write it."""
    drawn = [ask(text, prompt="a", n=2, seed=seed).images for _ in range(20)]
    assert len({images[0].seed for images in drawn}) > 15
    assert all(0 <= images[0].seed < 2**32 and images[1].seed == images[0].seed + 1 for images in drawn)


@pytest.mark.parametrize("value", [4, 4.0])
def test_a_whole_number_may_be_written_with_a_point(text: Card, value: float) -> None:
    assert ask(text, prompt="a", num_inference_steps=value).recipe.steps == 4


def test_partial_images_need_a_stream(text: Card) -> None:
    assert ask(text, prompt="a", partial_images=3).delivery.previews == 0


@pytest.mark.parametrize("given", [1, "goldfish", "GOLDFISH ", "1", 1.0])
def test_a_class_by_id_or_name(label: Card, given: object) -> None:
    assert ask(label, class_label=given).images[0].condition == ClassLabel(1)


def test_classes_by_synonym_in_a_list(label: Card) -> None:
    request = ask(label, class_label=["Tinca tinca", 5], seed=3)
    assert [(spec.condition, spec.seed) for spec in request.images] == [(ClassLabel(0), 3), (ClassLabel(5), 4)]
    assert request.recipe.text_length == 0


def test_a_prompt_names_the_class_when_nothing_else_does(label: Card) -> None:
    """The openai client cannot leave `prompt` out."""
    assert ask(label, prompt="golden retriever").images[0].condition == ClassLabel(5)
    body = read_body({"prompt": "a dog", "class_label": 5})
    assert body.to_request(label, "id").images[0].condition == ClassLabel(5)


TEXT_ERRORS: list[tuple[dict[str, Any], str, Code, str]] = [
    ({"prompt": None}, "prompt", "invalid_value", "required"),
    ({"prompt": 3}, "prompt", "invalid_value", "a string or a list of strings"),
    ({"prompt": ["a", None]}, "prompt", "invalid_value", "expects a string"),
    ({"prompt": []}, "prompt", "invalid_value", "1 to 4"),
    ({"prompt": ["a"] * 5}, "prompt", "invalid_value", "1 to 4"),
    ({"prompt": ["a", "b"], "n": 2}, "n", "invalid_value", "must be 1"),
    ({"prompt": "a" * 201}, "prompt", "invalid_value", "0 to 200"),
    ({"prompt": "\ud800"}, "prompt", "invalid_value", "lone surrogate"),
    ({"negative_prompt": "a" * 201}, "negative_prompt", "invalid_value", "0 to 200"),
    ({"negative_prompt": False}, "negative_prompt", "invalid_value", "a string"),
    ({"n": 0}, "n", "invalid_value", "1 to 4"),
    ({"n": 5}, "n", "invalid_value", "1 to 4"),
    ({"n": True}, "n", "invalid_value", "whole number"),
    ({"n": "2"}, "n", "invalid_value", "whole number"),
    ({"n": 1.5}, "n", "invalid_value", "whole number"),
    ({"n": float("nan")}, "n", "invalid_value", "whole number"),
    ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value", "1 to 50"),
    ({"num_inference_steps": 51}, "num_inference_steps", "invalid_value", "1 to 50"),
    ({"num_inference_steps": False}, "num_inference_steps", "invalid_value", "whole number"),
    ({"num_inference_steps": 1e999}, "num_inference_steps", "invalid_value", "whole number"),
    ({"num_inference_steps": 10**400}, "num_inference_steps", "invalid_value", "1 to 50"),
    ({"guidance_scale": -0.1}, "guidance_scale", "invalid_value", "0 to 20"),
    ({"guidance_scale": 20.1}, "guidance_scale", "invalid_value", "0 to 20"),
    ({"guidance_scale": float("inf")}, "guidance_scale", "invalid_value", "finite number"),
    ({"guidance_scale": True}, "guidance_scale", "invalid_value", "finite number"),
    ({"guidance_scale": "3"}, "guidance_scale", "invalid_value", "finite number"),
    ({"seed": -2}, "seed", "invalid_value", "-1 to 9223372036854775807"),
    ({"seed": 2**63}, "seed", "invalid_value", "-1 to 9223372036854775807"),
    ({"sampler": "ddim"}, "sampler", "invalid_value", "flow_euler"),
    ({"sampler": ""}, "sampler", "invalid_value", "flow_heun"),
    ({"schedule": "Karras"}, "schedule", "invalid_value", "karras, exponential, sgm_uniform"),
    ({"schedule": 7}, "schedule", "invalid_value", "a string"),
    ({"schedule": "karras", "sampler": "flow_dpmpp_2m"}, "schedule", "invalid_value", "does not go with flow_dpmpp_2m"),
    ({"clip_skip": 1}, "clip_skip", "invalid_value", "tiny-text"),
    ({"size": "31x32"}, "size", "invalid_value", "16 to 64 pixels, multiples of 16"),
    ({"size": "80x64"}, "size", "invalid_value", "16 to 64"),
    ({"size": "32"}, "size", "invalid_value", "16 to 64"),
    ({"size": "032x32"}, "size", "invalid_value", "16 to 64"),
    ({"size": "99999999x1"}, "size", "invalid_value", "16 to 64"),
    ({"size": "32x32\n"}, "size", "invalid_value", "16 to 64"),
    ({"size": "32x32 "}, "size", "invalid_value", "16 to 64"),
    ({"size": "٣٢x32"}, "size", "invalid_value", "16 to 64"),
    ({"size": 32}, "size", "invalid_value", "a string"),
    ({"max_sequence_length": 25}, "max_sequence_length", "invalid_value", "1 to 24"),
    ({"class_label": 3}, "class_label", "invalid_value", "has no classes"),
    ({"class_label": ""}, "class_label", "invalid_value", "has no classes"),
    ({"priority": 11}, "priority", "invalid_value", "-10 to 10"),
    ({"deadline": 0}, "deadline", "invalid_value", "0.1 to 86400"),
    ({"partial_images": 4}, "partial_images", "invalid_value", "0 to 3"),
    ({"stream": 1}, "stream", "invalid_value", "true or false"),
    ({"grid": 2}, "grid", "invalid_value", "JSON object"),
    ({"grid": {}}, "grid.columns", "invalid_value", "required"),
    ({"grid": {"columns": 0}}, "grid.columns", "invalid_value", "1 to 4"),
    ({"grid": {"columns": 1, "rows": 2}}, "grid.rows", "invalid_value", "unknown"),
    ({"output_compression": 101}, "output_compression", "invalid_value", "0 to 100"),
    ({"output_format": "gif"}, "output_format", "unsupported_parameter", "png, jpeg, webp"),
    ({"output_format": "svg"}, "output_format", "unsupported_parameter", "png, jpeg, webp"),
    ({"response_format": "url"}, "response_format", "unsupported_parameter", "b64_json"),
    ({"response_format": 3}, "response_format", "invalid_value", "b64_json"),
    ({"output_format": ["png"]}, "output_format", "invalid_value", "png, jpeg, webp"),
    ({"promt": "a"}, "promt", "unknown_parameter", '"prompt"'),
    ({"steps": 4}, "steps", "unknown_parameter", '"num_inference_steps"'),
    ({"cfg_scale": 4}, "cfg_scale", "unknown_parameter", '"guidance_scale"'),
    ({"zzzzz": 4}, "zzzzz", "unknown_parameter", "zzzzz"),
]


@pytest.mark.parametrize(("fields", "param", "code", "words"), TEXT_ERRORS)
def test_an_error_names_the_field_and_its_range(
    text: Card, fields: dict[str, Any], param: str, code: Code, words: str
) -> None:
    with refused(code) as caught:
        ask(text, **{"prompt": "a", **fields})
    assert caught.value.param == param
    assert words in caught.value.message and param in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "class_label", "required"),
        ({"class_label": 6}, "class_label", "0 to 5"),
        ({"class_label": -1}, "class_label", "0 to 5"),
        ({"class_label": "6"}, "class_label", "0 to 5"),
        ({"class_label": True}, "class_label", "id or a class name"),
        ({"class_label": 1.5}, "class_label", "id or a class name"),
        ({"class_label": "crane"}, "class_label", "2, 4"),
        ({"class_label": "retriever"}, "class_label", 'did you mean "golden retriever"'),
        ({"class_label": "goldfsh"}, "class_label", 'did you mean "goldfish"'),
        ({"class_label": "qqq"}, "class_label", "/v1/models/tiny-label/classes"),
        ({"class_label": []}, "class_label", "1 to 4"),
        ({"class_label": [1, 2], "n": 2}, "n", "must be 1"),
        ({"prompt": "a dog"}, "prompt", "no such class"),
        ({"class_label": 1, "negative_prompt": "x"}, "negative_prompt", "takes none"),
        ({"class_label": 1, "max_sequence_length": 8}, "max_sequence_length", "reads no text"),
        ({"class_label": 1, "size": "64x64"}, "size", '"32x32"'),
        ({"class_label": 1, "sampler": "flow_euler"}, "sampler", "ddpm"),
    ],
)
def test_errors_of_a_label_model(label: Card, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        ask(label, **fields)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize("raw", [None, [], "prompt", 3])
def test_a_body_is_an_object(raw: object) -> None:
    with refused("invalid_json", match="JSON object"):
        read_body(raw)


def test_a_square_model_says_so() -> None:
    assert '"WxW"' in str(Sizes(min=16, max=64, multiple=16, square=True))
