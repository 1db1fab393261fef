"""What is asked for without effect is said: in the JSON, in a header beside raw bytes, in the stream's last event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cards.card import Card, SkipLayers
from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.jobs.body import read_body
from app.jobs.job import Job
from app.jobs.replies import warnings
from app.keys import NOBODY, ApiKey
from app.settings import Settings
from tests.parts.servers import generate

IN_VAIN: list[tuple[dict[str, Any], str]] = [
    ({"negative_prompt": "blue", "guidance_scale": 1}, "negative_prompt is ignored: it takes a guidance_scale over 1"),
    ({"guidance_scale": 0.5}, "guidance_scale is ignored: 1 or less draws without guidance"),
    ({"output_compression": 50}, "output_compression is ignored: png is lossless"),
    ({"background": "transparent"}, "background is ignored: pictures are opaque"),
    ({"quality": "hd"}, "quality is ignored: num_inference_steps"),
    ({"quality": ["high"]}, "quality is ignored: num_inference_steps"),
    ({"style": "vivid"}, "style is ignored: write the style into the prompt"),
    ({"moderation": "high"}, "moderation is ignored: nothing is filtered here"),
    ({"complexity": 3}, "complexity is ignored"),
    ({"prompt": "a (red:1.3) apple"}, 'prompt: "(red:1.3)" is read as plain text'),
    ({"prompt": ["a", "(red apple : 2)"]}, 'prompt: "(red apple : 2)" is read as plain text'),
    ({"prompt": "a (red)1.3 apple"}, 'prompt: "(red)1.3" is read as plain text'),
    ({"prompt": "a (big dog)++"}, 'prompt: "(big dog)++" is read as plain text'),
    ({"prompt": "a [cat:dog:0.5]"}, 'prompt: "[cat:dog:0.5]" is read as plain text'),
    ({"prompt": "a <lora:pixel:0.8>"}, 'prompt: "<lora:pixel:0.8>" is read as plain text: the field loras has LoRAs'),
    ({"negative_prompt": "embedding:bad"}, 'negative_prompt: "embedding:bad" is read as plain text'),
]

PLAIN: list[dict[str, Any]] = [
    {"negative_prompt": "blue", "guidance_scale": 3},
    {"negative_prompt": "", "guidance_scale": 0},
    {"guidance_scale": 0},
    {"guidance_scale": 1},
    {"background": "auto", "quality": "auto", "moderation": "auto"},
    {"background": "opaque", "quality": "standard", "moderation": "low", "user": "me", "safety_identifier": "x"},
    {"prompt": "a cat (black and white), 16:9, at (10:30), smiling :) [sic]; C++ <3", "partial_images": 0},
]


@pytest.mark.parametrize(("length", "found"), [(None, 0), (77, 0), (24, 1), (512, 1)])
def test_a_text_length_has_no_effect_where_there_is_no_t5(length: int | None, found: int) -> None:
    """The key of its rows has CLIP's length, whatever is asked for."""
    card = read_cards(Path(__file__).parents[2] / "models")["sdxl"]
    body = read_body({"prompt": "a", "max_sequence_length": length})
    job = Job(body.to_request(card, "job"), card, body)
    assert job.request.recipe.key.text_length == 77
    warning = "max_sequence_length is ignored: sdxl reads 77 tokens"
    assert warnings(job, []).count(warning) == found == len(warnings(job, []))


def said(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200, reply.text
    found: list[str] = reply.json().get("warnings", [])
    return found


@pytest.mark.parametrize(("body", "words"), IN_VAIN, ids=lambda value: str(value)[:50])
def test_a_field_without_effect_is_a_warning(http: httpx.Client, body: dict[str, Any], words: str) -> None:
    (warning,) = said(generate(http, {"prompt": "a", **body}))
    assert warning.startswith(words)


@pytest.mark.parametrize("body", PLAIN, ids=str)
def test_a_field_that_asks_for_nothing_else_is_none(http: httpx.Client, body: dict[str, Any]) -> None:
    assert said(generate(http, {"prompt": "a", **body})) == []


def test_previews_without_a_stream(http: httpx.Client) -> None:
    body = {"prompt": "a", "partial_images": 2}
    assert said(generate(http, body)) == ["partial_images is ignored: previews come with stream"]
    assert completed(http, body) == []


def completed(http: httpx.Client, body: dict[str, Any], accept: str = "*/*") -> list[str]:
    """The warnings of a stream's last event."""
    last = generate(http, {**body, "stream": True}, accept).text.strip().split("\n\n")[-1]
    found: list[str] = json.loads(last.split("data: ")[1]).get("warnings", [])
    return found


def test_a_stream_says_so_in_its_last_event(http: httpx.Client) -> None:
    assert completed(http, {"prompt": "a", "background": "transparent"}) == [
        "background is ignored: pictures are opaque"
    ]
    (accept,) = completed(http, {"prompt": "a"}, "image/webp")
    assert accept == "Accept is ignored: stream answers with events"


def test_raw_bytes_say_so_in_a_header(http: httpx.Client) -> None:
    body = {"prompt": "a", "output_format": "webp", "output_compression": 5, "style": "vivid"}
    told = json.loads(generate(http, body, "image/png").headers["x-warning"])
    assert [text.split(" is ")[0] for text in told.split("; ")[:2]] == ["output_format", "output_compression"]
    assert "style is ignored" in told
    assert "x-warning" not in generate(http, {**body, "style": None}, "image/webp").headers


def test_compression_of_what_is_compressed_is_none(http: httpx.Client) -> None:
    for format in ("jpeg", "webp"):
        assert said(generate(http, {"prompt": "a", "output_format": format, "output_compression": 50})) == []


def test_a_comparison_says_it_once_for_all_and_by_model_what_is_the_models(http: httpx.Client) -> None:
    body = {"models": ["tiny-text"], "prompt": ["a (b:1.2)", "c"], "negative_prompt": "d", "guidance_scale": 0}
    told = said(http.post("/v1/images/compare", json={**body, "background": "transparent"}))
    assert [text.split(":")[0] for text in told] == ["background is ignored", "prompt", "tiny-text"]


@pytest.mark.parametrize(
    ("steps", "sampler", "most"), [(1, "flow_euler", 0), (3, "flow_euler", 2), (1, "flow_heun", 0)]
)
def test_more_previews_than_there_are_steps_before_the_last(plain: Card, steps: int, sampler: str, most: int) -> None:
    body = {"stream": True, "num_inference_steps": steps, "sampler": sampler}
    told = [f"partial_images: at most {most} come before an image of {steps} steps"]
    assert of(plain, **body, partial_images=3) == told
    assert (
        of(plain, **body, partial_images=most)
        == of(plain, **{**body, "num_inference_steps": 4}, partial_images=3)
        == []
    )


@pytest.fixture(scope="module")
def plain(settings: Settings) -> Card:
    return Registry(read_cards(settings.models), settings).default


def of(card: Card, key: ApiKey = NOBODY, **fields: Any) -> list[str]:
    body = read_body({"prompt": "a", **fields})
    return warnings(Job(body.to_request(card, "id", key), card, body), [])


def test_a_priority_that_the_key_does_not_have(plain: Card) -> None:
    key = ApiKey("alice", priority=2)
    assert of(plain, key, priority=5) == ["priority is 2: more is not for this key"]
    assert of(plain, key, priority=2) == of(plain, key, priority=-5) == of(plain, key) == []


def test_guidance_of_other_kinds(plain: Card) -> None:
    embedded = plain.model_copy(update={"family": "flux", "guidance": "embedded"})
    skipping = plain.model_copy(update={"skip_layer_guidance": SkipLayers(layers=(1,), scale=0.0)})
    (negative,) = of(embedded, negative_prompt="b")
    assert negative.startswith("negative_prompt is ignored: it takes a true_cfg_scale over 1")
    assert of(embedded, negative_prompt="b", true_cfg_scale=2) == of(embedded, guidance_scale=0.5) == []
    assert [one.split()[0] for one in of(skipping, skip_layer_guidance_start=0)] == ["skip_layer_guidance_start"]
    assert of(skipping, skip_layer_guidance_start=0, skip_layer_guidance_scale=2) == []


def test_an_unguided_model_says_that_it_is_one(plain: Card) -> None:
    turbo = plain.model_copy(update={"defaults": plain.defaults.model_copy(update={"guidance_scale": 0.0})})
    (told,) = of(turbo, negative_prompt="b")
    assert told.endswith("over 1, and tiny-text draws without by default")
    assert of(turbo, negative_prompt="b", guidance_scale=4) == []


def test_a_long_prompt_is_looked_through_in_no_time(http: httpx.Client) -> None:
    """Warnings are looked for with patterns, which may take for ever on what nearly fits them."""
    for text in ("(" * 199, "(:" + "1" * 190, "(" + ": " * 90, "[" + ":" * 190, "<lora:" * 33, "(a)" + "+" * 190):
        assert generate(http, {"prompt": text}).elapsed.total_seconds() < 5
