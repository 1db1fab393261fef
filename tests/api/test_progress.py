"""Streams that show every step: what comes first, when, and what an error is then."""

from __future__ import annotations

import base64
from io import BytesIO

import httpx
import openai
import pytest
from PIL import Image

from app.request import Prompt
from tests.api.streams import events, kinds, pixel
from tests.parts.fake_worker import colour
from tests.parts.servers import Server, generate
from tests.parts.waiting import eventually

STREAM = {"stream": True, "progress": True}


def steps(found: list[dict[str, object]], index: int | None = None) -> list[tuple[object, object]]:
    wanted = [event for event in found if event.get("type", "").endswith(".progress")]  # type: ignore[attr-defined]
    return [(event["step"], event["steps"]) for event in wanted if event.get("image_index") == index]


def test_a_stream_begins_with_what_was_expected_and_shows_every_step(http: httpx.Client) -> None:
    found = events(generate(http, {"prompt": "a", "partial_images": 1, **STREAM}).text)
    assert kinds(found) == ["accepted", *["progress"] * 2, "partial_image", *["progress"] * 2, "completed"]
    assert {event["type"].partition(".")[0] for event in found} == {"image_generation"}
    assert found[0].keys() == {"type", "queue_position", "estimated_wait", "cost"}
    timings = found[-1]["timings"]
    assert all(found[0][name] == timings[name] for name in ("queue_position", "estimated_wait", "cost"))
    assert found[1] == {"type": "image_generation.progress", "step": 1, "steps": 4}
    assert steps(found) == [(step, 4) for step in (1, 2, 3, 4)]


def test_every_image_has_steps_of_its_own(http: httpx.Client) -> None:
    found = events(generate(http, {"prompt": ["a", "b"], "grid": {"columns": 2}, **STREAM}).text)
    assert [steps(found, index) for index in (0, 1, None)] == [[(step, 4) for step in (1, 2, 3, 4)]] * 2 + [[]]
    assert kinds(found).count("completed") == 1 and "image_index" not in found[-1]


def test_an_edit_has_its_own_names(http: httpx.Client) -> None:
    file = BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "png")
    body = {"image": base64.b64encode(file.getvalue()).decode(), "prompt": "a", "strength": 1, **STREAM}
    found = events(http.post("/v1/images/edits", json=body).text)
    assert [event["type"] for event in found] == [
        *("image_edit.accepted", *["image_edit.progress"] * 4, "image_edit.completed")
    ]


def test_the_first_event_comes_at_once(http: httpx.Client, server: Server) -> None:
    """While the picture still takes a minute, and before anything is known of it."""
    body = {"prompt": "!slow 60", "num_inference_steps": 50, **STREAM}
    with http.stream("POST", "/v1/images/generations", json=body) as reply:
        first = next(block for block in reply.iter_lines())
        assert (reply.status_code, first) == (200, "event: image_generation.accepted")
    eventually(lambda: server.supervisor.running + server.supervisor.waiting == 0)


@pytest.mark.parametrize(("prompt", "code"), [("!load", "model_load_failed"), ("!oom", "insufficient_gpu_memory")])
def test_an_error_after_it_is_an_event(http: httpx.Client, prompt: str, code: str) -> None:
    reply = generate(http, {"prompt": f"{prompt} with progress", **STREAM})
    found = events(reply.text)
    assert (reply.status_code, kinds(found)[0], kinds(found)[-1]) == (200, "accepted", code)
    assert "completed" not in kinds(found) and found[-1].keys() == {"error"}
    eventually(lambda: generate(http, {"prompt": "a"}).status_code == 200)


@pytest.mark.parametrize(("field", "value"), [("sampler", "ddim"), ("progress", 1), ("model", "nothing")])
def test_an_error_before_it_is_a_status(http: httpx.Client, field: str, value: object) -> None:
    reply = generate(http, {"prompt": "a", **STREAM, field: value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404 if field == "model" else 400, field)


def test_without_a_stream_it_is_a_warning(http: httpx.Client) -> None:
    assert generate(http, {"prompt": "a", "progress": True}).json()["warnings"] == [
        "progress is ignored: steps are shown with stream"
    ]
    assert "warnings" not in generate(http, {"prompt": "a", "progress": False}).json()


def test_the_openai_client_reads_it_unmodified(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {"prompt": "a cat", "stream": True, "partial_images": 1}
    for more in ({}, {"progress": False}, {"progress": True}):
        got = list(client.images.generate(**asked, extra_body={"seed": 5, **more}))  # type: ignore[call-overload]
        shown = [event.type.partition(".")[2] for event in got]
        plain = [kind for kind in shown if kind not in ("accepted", "progress")]
        assert plain == ["partial_image", "completed"] and (len(shown) == 7) == bool(more.get("progress"))
        assert pixel({"b64_json": got[-1].b64_json}) == colour(Prompt("a cat"), 5)
