"""The image route over a real socket: the unmodified openai client, raw bytes, sheets, and what a file tells."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from app.imaging import LONGEST
from app.request import ClassLabel, Prompt
from tests.parts.fake_worker import colour
from tests.parts.servers import Server, generate
from tests.parts.waiting import eventually


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def opened(data: bytes | str) -> Image.Image:
    image = Image.open(BytesIO(base64.b64decode(data) if isinstance(data, str) else data))
    image.load()
    return image


def corner(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return tuple(int(value) for value in np.asarray(image)[y, x])


def test_the_openai_client_gets_its_image(client: openai.OpenAI) -> None:
    reply = client.images.generate(prompt="a cat", model="gpt-image-1", size="64x32", extra_body={"seed": 5})
    assert reply.data is not None and len(reply.data) == 1
    image = opened(str(reply.data[0].b64_json))
    assert (image.format, image.size, corner(image)) == ("PNG", (64, 32), colour(Prompt("a cat"), 5))
    assert (reply.size, reply.output_format) == ("64x32", "png")
    assert reply.usage is not None and reply.usage.total_tokens == 24 + 4 * 2
    assert reply.model_extra is not None and reply.data[0].model_extra == {"seed": 5}
    assert reply.model_extra["model"] == "tiny-text"
    assert reply.model_extra["sampler"] == "flow_euler"
    assert (reply.model_extra["num_inference_steps"], reply.model_extra["guidance_scale"]) == (4, 3.0)
    assert set(reply.model_extra["timings"]) >= {"queue", "encode", "denoise", "decode", "image_encode", "steps"}


def test_n_images_with_seeds_that_count_up(client: openai.OpenAI) -> None:
    reply = client.images.generate(prompt="a cat", n=3, extra_body={"seed": 7})
    got = [(item.model_extra, corner(opened(str(item.b64_json)))) for item in reply.data or []]
    assert got == [({"seed": seed}, colour(Prompt("a cat"), seed)) for seed in (7, 8, 9)]


def test_a_seed_is_drawn_and_told(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt="a cat").data for _ in range(2))
    assert first and second
    assert first[0].model_extra != second[0].model_extra


def test_formats_and_compression(client: openai.OpenAI) -> None:
    for format in ("jpeg", "webp"):
        reply = client.images.generate(prompt="a", output_format=format, output_compression=50)  # type: ignore[call-overload]
        assert opened(str(reply.data[0].b64_json)).format == format.upper()
        assert reply.output_format == format


@pytest.mark.parametrize(
    ("fields", "kind", "status", "code", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, 404, "model_not_found", "model"),
        ({"size": "17x17"}, openai.BadRequestError, 400, "invalid_value", "size"),
        ({"response_format": "url"}, openai.BadRequestError, 400, "unsupported_parameter", "response_format"),
        ({"extra_body": {"stepz": 3}}, openai.BadRequestError, 400, "unknown_parameter", "stepz"),
        ({"prompt": "!nan"}, openai.InternalServerError, 500, "non_finite_output", None),
        ({"prompt": "!oom"}, openai.InternalServerError, 507, "insufficient_gpu_memory", None),
    ],
)
def test_errors_arrive_as_the_clients_own_exceptions(
    client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], status: int, code: str, param: str
) -> None:
    with pytest.raises(kind) as caught:
        client.images.generate(**{"prompt": "a", **fields})
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
    assert caught.value.body["message"]  # type: ignore[index]


def test_the_client_does_not_retry_what_would_fail_again(url: str, http: httpx.Client) -> None:
    eager = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2)
    before = counted(http, 'requests_failed_total{model="tiny-text",reason="non_finite_output"}')
    with pytest.raises(openai.InternalServerError):
        eager.images.generate(prompt="!nan")
    assert counted(http, 'requests_failed_total{model="tiny-text",reason="non_finite_output"}') == before + 1


def counted(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"instep_{name} "))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_raw_bytes_by_accept(http: httpx.Client, format: str) -> None:
    reply = generate(http, {"prompt": "a cat", "seed": 9}, f"image/{format}")
    assert (reply.status_code, reply.headers["content-type"], reply.headers["x-seed"]) == (200, f"image/{format}", "9")
    assert opened(reply.content).format == format.upper()


def test_any_image_type_is_raw_bytes(http: httpx.Client) -> None:
    reply = generate(http, {"prompt": "a"}, "image/*")
    assert (reply.headers["content-type"], opened(reply.content).format) == ("image/png", "PNG")
    assert generate(http, {"prompt": "a", "output_format": "webp"}, "image/*").headers["content-type"] == "image/webp"
    assert generate(http, {"prompt": "a"}, "*/*").headers["content-type"] == "application/json"
    panel = http.post(
        "/v1/images/compare", json={"models": ["tiny-text"], "prompt": "a"}, headers={"Accept": "image/*"}
    )
    assert panel.headers["content-type"] == "image/png"


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_type_that_is_not_written_is_406(http: httpx.Client, stream: bool) -> None:
    reply = generate(http, {"prompt": "a", "stream": stream}, "image/gif")
    assert (reply.status_code, reply.json()["error"]["code"]) == (406, "not_acceptable")
    assert "image/png, image/jpeg, image/webp" in reply.json()["error"]["message"]


def test_a_random_seed_is_told(http: httpx.Client) -> None:
    seeds = {generate(http, {"prompt": "a", "seed": -1}).json()["data"][0]["seed"] for _ in range(5)}
    assert len(seeds) == 5 and min(seeds) >= 0
    raw = generate(http, {"prompt": "a", "seed": -1}, "image/png")
    again = generate(http, {"prompt": "a", "seed": int(raw.headers["x-seed"])}, "image/png")
    assert again.content == raw.content
    panel = http.post("/v1/images/compare", json={"models": ["tiny-text"], "prompt": ["a", "b"], "seed": -1}).json()
    assert len({cell["seed"] for cell in panel["cells"]}) == 1 and panel["cells"][0]["seed"] >= 0


def test_several_images_as_raw_bytes_need_a_grid(http: httpx.Client) -> None:
    refused = generate(http, {"prompt": "a", "n": 3}, "image/png")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "grid")
    sheet = opened(generate(http, {"prompt": "a", "n": 3, "seed": 1, "grid": {"columns": 2}}, "image/png").content)
    assert sheet.size == (64, 64)
    expected = [colour(Prompt("a"), seed) for seed in (1, 2, 3)] + [(0, 0, 0)]
    assert [corner(sheet, x, y) for y in (0, 32) for x in (0, 32)] == expected


def test_a_sheet_longer_than_its_format_is_refused_before_it_is_drawn(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LONGEST, "webp", 64)
    body = {"prompt": "a", "n": 3, "seed": 1, "output_format": "webp"}
    refused = generate(http, {**body, "grid": {"columns": 3}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "grid")
    assert "96 x 32 pixels; a side of webp has at most 64" in refused.json()["error"]["message"]
    assert generate(http, {**body, "grid": {"columns": 2}}).status_code == 200
    assert generate(http, body).status_code == 200


def test_a_sheet_in_json(http: httpx.Client) -> None:
    reply = generate(http, {"prompt": ["a", "b"], "seed": 1, "grid": {"columns": 2}}).json()
    assert (len(reply["data"]), reply["size"], reply["data"][0]["seed"]) == (1, "64x32", 1)
    sheet = opened(reply["data"][0]["b64_json"])
    assert [corner(sheet, 0), corner(sheet, 32)] == [colour(Prompt("a"), 1), colour(Prompt("b"), 2)]


def test_a_class_by_name_is_told_by_name_and_id(http: httpx.Client) -> None:
    reply = generate(http, {"model": "tiny-label", "class_label": ["goldfish", 5], "seed": 1, "prompt": "x"}).json()
    assert [item["class_label"] for item in reply["data"]] == [1, 5]
    assert [item["revised_prompt"] for item in reply["data"]] == ["goldfish", "golden retriever"]
    assert corner(opened(reply["data"][1]["b64_json"])) == colour(ClassLabel(5), 2)
    assert reply["warnings"] == ["prompt is ignored: tiny-label draws class_label"]


def test_a_warning_travels_with_raw_bytes(http: httpx.Client) -> None:
    reply = generate(http, {"model": "tiny-label", "class_label": 1, "prompt": "x\r\ny"}, "image/png")
    assert reply.headers["x-warning"] == '"prompt is ignored: tiny-label draws class_label"'


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_503_before_any_stream(
    http: httpx.Client, url: str, server: Server, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{url}/v1/images/generations", json={"prompt": "!slow 0.5"})
        eventually(lambda: sum(server.supervisor.queues) > 0)
        monkeypatch.setattr(server.supervisor, "max_wait", 1e-9)
        reply = generate(http, {"prompt": "a", "stream": stream})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(reply.headers["retry-after"]) <= 120
        assert first.result().status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a cat", "negative_prompt": "dog", "guidance_scale": 2.5, "sampler": "flow_heun", "size": "16x48"},
        {"prompt": "a cat", "sampler": "flow_dpmpp_2m_sd3", "schedule": "karras"},
        {"prompt": "苹果 🍎", "n": 3, "grid": {"columns": 2}, "guidance_scale": 0},
        {"prompt": ["a", "b", "c"], "grid": {"columns": 3}, "max_sequence_length": 7},
        {"model": "tiny-label", "class_label": "goldfish", "num_inference_steps": 9},
        {"model": "tiny-label", "class_label": [1, 2], "grid": {"columns": 1}},
    ],
)
def test_the_request_in_the_file_makes_the_file_again(http: httpx.Client, body: dict[str, object]) -> None:
    first = generate(http, body, "image/png").content
    told = json.loads(opened(first).text["instep"])  # type: ignore[attr-defined]
    assert told.items() >= {key: value for key, value in body.items() if key != "class_label"}.items()
    assert generate(http, told, "image/png").content == first


def test_the_files_parameters_are_a1111s(http: httpx.Client) -> None:
    image = opened(generate(http, {"prompt": "a cat", "seed": 5}, "image/png").content)
    expected = "a cat\nSteps: 4, Sampler: flow_euler, CFG scale: 3.0, Seed: 5, Size: 32x32, Model: tiny-text"
    assert image.text["parameters"] == expected  # type: ignore[attr-defined]
