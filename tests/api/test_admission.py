"""The door over a real socket: keys and their shares, deadlines of bodies and clients, what a reply tells of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from app.settings import Settings
from tests.parts.fake_worker import RATE
from tests.parts.servers import Server, bearer, generate
from tests.parts.supervising import tenants
from tests.parts.waiting import eventually

FLOOD, SMALL = ("sk-flood-0123456789", "sk-small-0123456789")
TIMEOUT = "x-stainless-read-timeout"
LARGE = {"prompt": "!slow 30", "n": 4, "num_inference_steps": 50}


@pytest.fixture(scope="module")
def narrow(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A queue of 500 passes, and two keys; one may have a hundred of its own in it."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[keys.small]\nkey = "{SMALL}"\nqueue = {100 * RATE}\npriority = 2\n', encoding="utf-8")
    changes = {"api_keys": f"flood={FLOOD}", "api_keys_file": str(file), "max_wait": 500 * RATE}
    with Server(settings.model_copy(update=changes)) as server:
        yield server.ready()


def ask(server: Server, key: str, **body: object) -> httpx.Response:
    url = f"{server.url}/v1/images/generations"
    return httpx.post(url, json={"prompt": "a", **body}, headers=bearer(key), timeout=60)


@pytest.mark.slow
def test_a_flood_is_told_that_it_floods_and_the_others_are_served(narrow: Server) -> None:
    supervisor = narrow.supervisor
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, narrow, FLOOD, **LARGE | {"prompt": "!slow 2"})
        eventually(lambda: tenants(supervisor).keys() == {"flood"})
        other = pool.submit(ask, narrow, SMALL, prompt="!slow 2", num_inference_steps=50)
        eventually(lambda: len(tenants(supervisor)) == 2)
        refused = ask(narrow, FLOOD)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 120 and refused.headers["x-should-retry"] == "true"
        over = ask(narrow, SMALL)
        assert over.status_code == 429 and "may have" in over.json()["error"]["message"]
        assert (first.result().status_code, other.result().status_code) == (200, 200)
    assert ask(narrow, SMALL).status_code == 200
    assert 'requests_rejected_total{model="tiny-text",reason="rate_limit_exceeded"} 2.0' in metrics(narrow)


def metrics(server: Server) -> str:
    return httpx.get(f"{server.url}/metrics").text


def test_a_request_carries_its_keys_name_weight_and_priority(narrow: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = narrow.supervisor.submit
    monkeypatch.setattr(
        narrow.supervisor,
        "submit",
        lambda job, **more: seen.append(job.request) or submit(job, **more),
    )
    for priority in (9, 1):
        assert ask(narrow, SMALL, priority=priority).status_code == 200
    assert [(request.delivery.tenant, request.delivery.weight, request.delivery.priority) for request in seen] == [
        ("small", 1.0, 2),
        ("small", 1.0, 1),
    ]


def test_a_deadline_that_the_work_alone_exceeds_is_504_at_once(http: httpx.Client) -> None:
    assert generate(http, {"prompt": "a"}).status_code == 200  # what a step takes is known from now on
    reply = http.post("/v1/images/generations", json=LARGE, headers={TIMEOUT: str(350 * RATE)})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert reply.headers["x-should-retry"] == "false" and "retry-after" not in reply.headers


@contextmanager
def occupied(server: Server) -> Iterator[None]:
    """Behind a large request, whose client leaves at the end."""
    body = json.dumps(LARGE).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.uvicorn.servers[0].sockets[0].getsockname()) as client:
        client.sendall(head.encode() + body)
        eventually(lambda: sum(server.supervisor.queues) > 400 * RATE)
        yield
    eventually(lambda: sum(server.supervisor.queues) == 0)


def test_a_deadline_that_the_queue_exceeds_is_503_and_the_clients_patience_is_a_deadline(
    http: httpx.Client, server: Server
) -> None:
    body = {"prompt": "a", "num_inference_steps": 50, "n": 2}
    with occupied(server):
        reply = http.post("/v1/images/generations", json=body, headers={TIMEOUT: str(300 * RATE)})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
        reply = http.post("/v1/images/generations", json=body | {"deadline": 0.1}, headers={TIMEOUT: "600"})
        assert reply.status_code == 503


@pytest.mark.parametrize(
    "values",
    [["NaN"], ["-1"], ["1e999"], ["1e-9"], ["0"], ["not given"], [""], ["0.001", "0.001"], ["0_1"], ["٣"], ["inf"]],
)
def test_a_patience_that_makes_no_sense_is_none(http: httpx.Client, values: list[str]) -> None:
    headers = [(TIMEOUT, value.encode()) for value in values]
    assert http.post("/v1/images/generations", json={"prompt": "a"}, headers=headers).status_code == 200


def test_the_openai_clients_timeout_reaches_the_door(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    large = {"prompt": "!slow 30", "n": 4, "extra_body": {"num_inference_steps": 50}}
    with pytest.raises(openai.InternalServerError) as refused:
        client.images.generate(**large, timeout=openai.Timeout(30, read=350 * RATE))  # type: ignore[arg-type]
    assert refused.value.code == "deadline_exceeded"


def test_a_reply_tells_what_was_expected(http: httpx.Client) -> None:
    told = generate(http, {"prompt": "a", "n": 2}).json()["timings"]
    assert told["cost"] == pytest.approx(2 * (4 * 2 + 2) * RATE)
    assert (told["estimated_wait"], told["queue_position"]) == (0.0, 0)
