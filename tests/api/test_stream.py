"""Events of a stream, as the openai client reads them and as they stand on the wire."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from app.request import Prompt
from tests.parts.fake_worker import colour
from tests.parts.servers import Server, generate
from tests.parts.waiting import eventually


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def events(http: httpx.Client, body: dict[str, object]) -> list[tuple[str | None, dict[str, Any]]]:
    reply = http.post("/v1/images/generations", json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in reply.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields.get("event"), json.loads(fields["data"])))
    return found


def pixel(b64: str) -> object:
    return Image.open(BytesIO(base64.b64decode(b64))).convert("RGB").getpixel((0, 0))


def test_the_openai_client_reads_partials_and_the_image(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body={"seed": 5})
    got = list(stream)
    assert [event.type for event in got] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in got[:-1]] == [0, 1, 2]  # type: ignore[union-attr]
    last = got[-1]
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == 24 + 4
    assert (last.output_format, last.size, last.model_extra and last.model_extra["seed"]) == ("png", "32x32", 5)
    assert pixel(last.b64_json) == colour(Prompt("a cat"), 5)


def test_without_partial_images_there_is_one_event(http: httpx.Client) -> None:
    assert [name for name, _ in events(http, {"prompt": "a"})] == ["image_generation.completed"]


def test_fields_on_the_wire(http: httpx.Client) -> None:
    partial, completed = events(http, {"prompt": "a", "partial_images": 1})
    shared = {"type", "b64_json", "background", "created_at", "output_format", "quality", "size"}
    assert partial[1].keys() >= shared | {"partial_image_index"}
    assert completed[1].keys() >= shared | {"usage", "seed", "timings"}
    assert completed[1]["timings"].keys() >= {"cost", "estimated_wait", "queue_position"}
    assert (partial[0], completed[0]) == (partial[1]["type"], completed[1]["type"])
    assert "image_index" not in partial[1] and "image_index" not in completed[1]


def test_several_images_say_which_they_are(http: httpx.Client) -> None:
    got = events(http, {"prompt": ["a", "b"], "partial_images": 1, "seed": 1})
    done = {data["image_index"]: data for name, data in got if name == "image_generation.completed"}
    assert {index: pixel(data["b64_json"]) for index, data in done.items()} == {
        0: colour(Prompt("a"), 1),
        1: colour(Prompt("b"), 2),
    }
    assert sorted(data["image_index"] for name, data in got if name == "image_generation.partial_image") == [0, 1]


def test_a_sheet_is_one_completed_event(http: httpx.Client) -> None:
    got = events(http, {"prompt": "a", "n": 4, "grid": {"columns": 2}, "partial_images": 1})
    *partials, (name, sheet) = got
    assert (name, sheet["size"], "image_index" in sheet) == ("image_generation.completed", "64x64", False)
    assert sorted(data["image_index"] for _, data in partials) == [0, 1, 2, 3]


def test_a_refusal_before_the_stream_is_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="a", stream=True, partial_images=1, extra_body={"sampler": "ddim"})


def test_a_failure_after_the_200_is_an_error_event(http: httpx.Client, client: openai.OpenAI) -> None:
    shown, (name, data) = events(http, {"prompt": "!nan", "partial_images": 3})
    assert shown[0] == "image_generation.partial_image"
    assert (name, data["error"]["code"]) == (None, "non_finite_output")
    with pytest.raises(openai.APIError, match="not finite") as caught:
        list(client.images.generate(prompt="!nan", stream=True, partial_images=3))
    assert not isinstance(caught.value, openai.APIStatusError)


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("!load", 503, "model_load_failed"),
        ("!oom", 507, "insufficient_gpu_memory"),
        ("!nan", 500, "non_finite_output"),
    ],
)
def test_a_failure_before_anything_is_shown_is_a_status(
    http: httpx.Client, client: openai.OpenAI, prompt: str, status: int, code: str
) -> None:
    reply = http.post("/v1/images/generations", json={"prompt": f"{prompt} streaming", "stream": True})
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers["x-should-retry"] == "false" and "retry-after" not in reply.headers
    eventually(lambda: generate(http, {"prompt": "a"}).status_code == 200)
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(prompt=f"{prompt} streaming again", stream=True)
    assert caught.value.status_code == status
    eventually(lambda: generate(http, {"prompt": "a"}).status_code == 200)


def test_a_client_that_leaves_before_the_status_cancels(http: httpx.Client, server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/images/generations", json={"prompt": "!slow 20", "stream": True}, timeout=0.3)
    eventually(lambda: server.supervisor.waiting + server.supervisor.running == 0)


def test_a_long_silence_is_filled_with_comments(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.images.HOLD", 0.05)
    monkeypatch.setattr("app.api.images.PING", 0.05)
    text = http.post("/v1/images/generations", json={"prompt": "!slow 0.5", "stream": True}).text
    assert text.startswith(": ping\n\n")
    assert text.count("event: image_generation.completed\n") == 1
