"""Models that cannot be served, behind a whole server, nothing faked: every way to ask for a picture is the same error.

One has a NaN in its VAE, one is not downloaded, one is larger than the memory that weights may take.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.parts.servers import generate, real_server
from tests.parts.tiny import write_dit, write_flux, write_sd3
from tests.parts.tiny_parts import spoil

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with these three models and a whole one; the first is its default."""
    folder = tmp_path_factory.mktemp("broken")
    models = folder / "models"
    write_dit(models / "tiny-dit")
    write_sd3(models / "tiny-sd3")
    spoil(models / "tiny-sd3" / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias")
    write_flux(models / "too-large", dev=False, num_single_layers=60)
    card = (models / "too-large" / "card.toml").read_text()
    (models / "absent").mkdir()
    (models / "absent" / "card.toml").write_text(
        card.replace('"too-large"', '"absent"').replace('path = "."', 'repo = "lab/absent"')
    )
    settings = {"models": models, "cache": folder / "cache", "default_model": "tiny-sd3", "device_memory": "1.5MB"}
    with real_server(**settings) as http:
        yield http


@pytest.mark.parametrize(
    ("rest", "accept"),
    [
        ({}, "application/json"),
        ({}, "image/png"),
        ({"n": 2}, "application/json"),
        ({"n": 2, "grid": {"columns": 2}}, "image/png"),
        ({"stream": True}, "text/event-stream"),
        ({"stream": True, "n": 2}, "application/json"),
    ],
)
def test_it_is_an_error_however_it_is_asked_for(broken: httpx.Client, rest: dict[str, object], accept: str) -> None:
    reply = generate(broken, {"prompt": "red", "num_inference_steps": 2, **rest}, accept)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (500, "false")
    assert reply.json()["error"]["code"] == "non_finite_output" and "not finite" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "status", "code", "words"),
    [
        ("absent", 503, "model_not_downloaded", "instep models pull absent"),
        ("too-large", 507, "insufficient_gpu_memory", "weights may take 1.5MB"),
    ],
)
def test_what_is_known_at_once_is_a_status_also_of_a_stream(
    broken: httpx.Client, model: str, status: int, code: str, words: str, stream: bool
) -> None:
    reply = generate(broken, {"model": model, "prompt": "red", "stream": stream})
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert words in reply.json()["error"]["message"] and reply.headers["x-should-retry"] == "false"


def test_no_preview_of_it_is_shown(broken: httpx.Client) -> None:
    body = {"prompt": "red", "num_inference_steps": 4, "stream": True, "partial_images": 3}
    reply = generate(broken, body)
    assert reply.status_code == 500 and "partial_image" not in reply.text


def test_a_comparison_names_the_model_and_is_no_panel(broken: httpx.Client) -> None:
    reply = broken.post("/v1/images/compare", json={"models": ["tiny-sd3"], "prompt": "red", "num_inference_steps": 2})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (500, "non_finite_output", "models.tiny-sd3")


def test_the_openai_client_asks_once(broken: httpx.Client) -> None:
    client = openai.OpenAI(base_url=str(broken.base_url.join("/v1")), api_key="none")
    before = counted(broken)
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.images.generate(prompt="red", extra_body={"num_inference_steps": 2})
    assert counted(broken) == before + 1


def counted(http: httpx.Client) -> float:
    """Requests that failed so, by the metrics."""
    lines = [line for line in http.get("/metrics").text.splitlines() if '"non_finite_output"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_the_other_model_is_served(broken: httpx.Client) -> None:
    body = {"model": "tiny-dit", "class_label": 1, "num_inference_steps": 2}
    assert generate(broken, body).status_code == 200
