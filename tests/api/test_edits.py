"""The routes that start from a picture, over a socket: the unmodified openai client, forms and JSON, the overlay."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from app.request import Prompt
from tests.api.test_access import lines, log  # noqa: F401
from tests.parts.fake_worker import colour
from tests.parts.servers import ALICE, BOB, Server, bearer
from tests.parts.waiting import eventually

PICTURE = np.random.default_rng(5).integers(0, 256, (32, 32, 3), np.uint8)
HOLE = np.zeros((32, 32), bool)
HOLE[8:24, 4:20] = True
ROUTES = ("edits", "variations")


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGE = png(PICTURE)
MASK = png(np.dstack([PICTURE, np.where(HOLE, 0, 255).astype(np.uint8)]))
"""As OpenAI has it: transparent where it is painted anew."""
WHITE = png(np.where(HOLE, 255, 0).astype(np.uint8))


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(data: bytes | str | None) -> np.ndarray:
    image = Image.open(BytesIO(base64.b64decode(data) if isinstance(data, str) else data or b""))
    return np.asarray(image.convert("RGB"))


def post(http: httpx.Client, body: dict[str, object], route: str = "edits", **headers: str) -> httpx.Response:
    """As JSON, with the picture where the body has none."""
    sent = {"image": base64.b64encode(IMAGE).decode(), **body}
    return http.post(f"/v1/images/{route}", json=sent, headers=headers)


def kept(pixels: np.ndarray) -> bool:
    """Whether every pixel outside the mask is the source's."""
    return np.array_equal(pixels[~HOLE], PICTURE[~HOLE])


@pytest.mark.parametrize("image", [("a.png", IMAGE), [("a.png", IMAGE)], IMAGE], ids=["a file", "a list", "bytes"])
def test_the_openai_client_edits_a_picture(client: openai.OpenAI, image: Any) -> None:
    fields: dict[str, Any] = {"n": 2, "size": "auto", "response_format": "b64_json", "background": "auto"}
    reply = client.images.edit(image=image, prompt="a cat", extra_body={"seed": 5, "strength": 0.75}, **fields)
    assert reply.data is not None and reply.model_extra is not None
    pixels = [opened(item.b64_json) for item in reply.data]
    assert [tuple(one[0, 0]) for one in pixels] == [colour(Prompt("a cat"), seed) for seed in (5, 6)]
    assert (reply.size, reply.model_extra["strength"], reply.model_extra["model"]) == ("32x32", 0.75, "tiny-text")
    assert reply.usage is not None and reply.usage.input_tokens_details.image_tokens == 2 * 4


def test_the_openai_client_edits_behind_a_mask(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"image": ("a.png", IMAGE), "mask": ("m.png", MASK), "prompt": "a cat"}
    reply = client.images.edit(**asked, extra_body={"seed": 5, "mask_blur": 0})
    pixels = opened((reply.data or [])[0].b64_json)
    assert kept(pixels) and (pixels[HOLE] == colour(Prompt("a cat"), 5)).all()
    plain = client.images.edit(**asked, extra_body={"seed": 5, "overlay": False})
    assert not kept(opened((plain.data or [])[0].b64_json))


def test_the_openai_client_streams_an_edit(client: openai.OpenAI) -> None:
    image, mask = ("a.png", IMAGE), ("m.png", MASK)
    with client.images.edit(image=image, mask=mask, prompt="a cat", stream=True, partial_images=2) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert all(kept(opened(event.b64_json)) for event in events)
    assert not any((opened(event.b64_json)[12:20, 8:16] == PICTURE[12:20, 8:16]).all() for event in events)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_the_openai_client_makes_a_variation(client: openai.OpenAI) -> None:
    reply = client.images.create_variation(image=("a.png", IMAGE), n=2, size="256x256", extra_body={"size": "32x32"})
    assert reply.data is not None and len(reply.data) == 2
    seeds = [(item.model_extra or {})["seed"] for item in reply.data]
    assert [tuple(opened(item.b64_json)[0, 0]) for item in reply.data] == [colour(Prompt(""), seed) for seed in seeds]
    assert reply.model_extra is not None and reply.model_extra["strength"] == 0.6


def test_the_form_of_open_webui(http: httpx.Client) -> None:
    """As its routers/images.py sends it: one file, no strength and no mask."""
    form = {"model": "gpt-image-1", "prompt": "a cat", "n": "1", "response_format": "b64_json"}
    form |= {"size": "32x32", "background": "opaque"}
    reply = http.post("/v1/images/edits", data=form, files={"image": ("image.png", IMAGE, "image/png")})
    assert reply.status_code == 200 and reply.json().keys().isdisjoint({"warnings"})
    (item,) = reply.json()["data"]
    assert tuple(opened(item["b64_json"])[0, 0]) == colour(Prompt("a cat"), item["seed"])


@pytest.mark.parametrize(
    "files",
    [
        {"image": base64.b64encode(IMAGE).decode(), "mask": base64.b64encode(WHITE).decode()},
        {"image": [f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"]},
        {"mask_image": f"data:image/png;base64,{base64.b64encode(WHITE).decode()}"},
    ],
)
def test_json_with_base64(http: httpx.Client, files: dict[str, object]) -> None:
    reply = post(http, {"prompt": "a cat", "seed": 5, **files})
    assert reply.status_code == 200
    assert kept(opened(reply.json()["data"][0]["b64_json"])) == (len(files) == 2 or "mask_image" in files)


def test_nested_fields_in_a_form_are_those_of_json(http: httpx.Client) -> None:
    form = {"prompt[]": ["a", "b"], "grid[columns]": "2", "seed": "5", "overlay": "true", "mask_blur": "0"}
    files = {"image[]": IMAGE, "mask_image": WHITE}
    sheet = http.post("/v1/images/edits", data=form, files=files, headers={"Accept": "image/png"})
    assert (sheet.status_code, sheet.headers["x-seed"]) == (200, "5")
    pixels = opened(sheet.content)
    assert pixels.shape == (32, 64, 3) and kept(pixels[:, :32]) and kept(pixels[:, 32:])
    assert [tuple(pixels[12, x]) for x in (10, 42)] == [colour(Prompt("a"), 5), colour(Prompt("b"), 6)]


def test_an_empty_file_is_none_only_without_a_name(http: httpx.Client) -> None:
    """As browsers send what nobody chose; a client that read its mask twice sends an empty one, and wants its mask."""
    for name, status in (("", 200), ("mask.png", 400)):
        part = f'--b\r\nContent-Disposition: form-data; name="mask"; filename="{name}"\r\n\r\n\r\n'
        head = '--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
        head += '--b\r\nContent-Disposition: form-data; name="image"\r\nContent-Type: image/png\r\n\r\n'
        body = part.encode() + head.encode() + IMAGE + b"\r\n--b--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        reply = http.post("/v1/images/edits", content=body, headers=headers)
        assert reply.status_code == status and ("mask: " in reply.text) == (status == 400)


def test_the_file_says_how_it_was_made(http: httpx.Client) -> None:
    reply = post(http, {"prompt": "a cat", "strength": 0.5, "resize": "pad", "seed": 5}, Accept="image/png")
    text = Image.open(BytesIO(reply.content)).info
    told = json.loads(text["instep"])
    assert told.items() >= {"strength": 0.5, "resize": "pad", "prompt": "a cat", "seed": 5}.items()
    assert "Denoising strength: 0.5" in text["parameters"]
    assert post(http, told, Accept="image/png").content == reply.content


@pytest.mark.parametrize(("picture", "size"), [((50, 50), "32x32"), ((300, 100), "48x16"), ((31, 64), "32x64")])
def test_a_picture_without_a_size_decides_it(http: httpx.Client, picture: tuple[int, int], size: str) -> None:
    image = base64.b64encode(png(np.zeros((picture[1], picture[0], 3), np.uint8))).decode()
    for body in ({}, {"size": "auto"}):
        assert post(http, {"prompt": "a", "image": image, **body}).json()["size"] == size
    assert post(http, {"prompt": "a", "image": image, "size": "64x64"}).json()["size"] == "64x64"


def test_a_model_of_classes_starts_from_a_picture_too(http: httpx.Client) -> None:
    for route in ROUTES:
        reply = post(http, {"model": "tiny-label", "class_label": 5, "seed": 1}, route)
        assert reply.status_code == 200 and reply.json()["data"][0]["revised_prompt"] == "golden retriever"
        error = post(http, {"model": "tiny-label"}, route).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "class_label")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_value", "prompt"),
        ({"prompt": "a", "model": "nope"}, 404, "model_not_found", "model"),
        ({"prompt": "a", "strength": 0}, 400, "invalid_value", "strength"),
        ({"prompt": "a", "resize": "fill"}, 400, "invalid_value", "resize"),
        ({"prompt": "a", "size": "17x17"}, 400, "invalid_value", "size"),
        ({"prompt": "a", "denoising_strength": 0.5}, 400, "unknown_parameter", "denoising_strength"),
        ({"prompt": "a", "n": 3}, 400, "invalid_value", "grid"),
        ({"prompt": "a", "image": "aaaa"}, 400, "invalid_value", "image"),
        ({"prompt": "a", "image": [base64.b64encode(IMAGE).decode()] * 2}, 400, "invalid_value", "image"),
        ({"prompt": "a", "response_format": "url"}, 400, "unsupported_parameter", "response_format"),
        ({"prompt": "a", "stream": "yes"}, 400, "invalid_value", "stream"),
        ({"prompt": "a", "image": "https://example.com/a.png"}, 400, "invalid_value", "image"),
        ({"prompt": "!nan"}, 500, "non_finite_output", None),
    ],
)
def test_errors(http: httpx.Client, body: dict[str, object], status: int, code: str, param: str | None) -> None:
    reply = post(http, body, Accept="image/png")
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)
    assert http.get("/health").json()["running"] == 0


def test_what_is_wrong_is_said_before_the_picture_is_decoded(http: httpx.Client) -> None:
    """The header is whole and the rest is missing, which only decoding notices."""
    half = base64.b64encode(IMAGE[: len(IMAGE) // 2]).decode()
    assert post(http, {"prompt": "a", "image": half, "seed": -2}).json()["error"]["param"] == "seed"
    assert post(http, {"prompt": "a", "image": half}).json()["error"]["param"] == "image"


def test_a_model_says_how_strong_its_edits_are(http: httpx.Client) -> None:
    assert http.get("/v1/models/tiny-text").json()["defaults"]["strength"] == 0.6


def test_the_generations_route_sends_elsewhere(http: httpx.Client) -> None:
    error = post(http, {"prompt": "a", "strength": 0.5}, "generations").json()["error"]
    assert error["message"] == 'Unknown field "image"; POST /v1/images/edits starts from a picture'


def test_an_edit_is_one_line_of_the_log(http: httpx.Client, log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    mask = base64.b64encode(WHITE).decode()
    assert post(http, {"prompt": "secret wish", "seed": 5, "mask": mask}).status_code == 200
    (line,) = lines(log, 1)
    assert (line["path"], line["status"], line["model"]) == ("/v1/images/edits", 200, "tiny-text")
    assert (line["strength"], line["masked"], line["seed"], line["images"]) == (0.6, True, 5, 1)
    assert "secret" not in str(log.records)


def test_keys_and_their_models(closed: Server) -> None:
    for route in ROUTES:
        with httpx.Client(base_url=closed.url) as http:
            assert post(http, {"prompt": "a"}, route).status_code == 401
            assert post(http, {"prompt": "a"}, route, **bearer(ALICE)).status_code == 200
            hidden = post(http, {"prompt": "a", "model": "tiny-text"}, route, **bearer(BOB))
            assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "model_not_found")


@pytest.fixture(scope="module")
def slow() -> str:
    """A picture that takes far longer to decode than a tenth of a second."""
    return base64.b64encode(png(np.zeros((8000, 8000, 3), np.uint8))).decode()


def counted(http: httpx.Client, name: str) -> float:
    found = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"instep_{name} ")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@pytest.mark.slow
def test_a_deadline_bounds_the_decoding(http: httpx.Client, slow: str) -> None:
    assert post(http, {"prompt": "a", "image": slow}, Accept="image/png").status_code == 200
    late = post(http, {"prompt": "a", "image": slow, "deadline": 0.1})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert post(http, {"prompt": "a", "deadline": 20}).status_code == 200


@pytest.mark.slow
def test_a_client_that_leaves_ends_the_decoding(
    http: httpx.Client,
    url: str,
    slow: str,
    log: pytest.LogCaptureFixture,  # noqa: F811
) -> None:
    name = 'requests_failed_total{model="tiny-text",reason="cancelled"}'
    before = counted(http, name)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/edits", json={"prompt": "a", "image": slow}, timeout=0.5)
    eventually(lambda: counted(http, name) == before + 1)
    (line,) = [line for line in lines(log, 1) if line["path"] == "/v1/images/edits"]
    assert (line["status"], line["error"]) == (499, "cancelled") and "queue_ms" not in line
