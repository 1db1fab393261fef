"""Clients that leave: their requests are cancelled at the next step, and nobody else's."""

from __future__ import annotations

import gc
import json
import logging
import socket
import struct
import time

import httpx
import pytest

from app.report import Result
from app.worker import child
from tests.api.test_access import lines, log  # noqa: F401
from tests.parts.servers import Server, generate
from tests.parts.waiting import eventually
from tests.parts.wires import connect


def cancelled(http: httpx.Client, model: str = "tiny-text") -> float:
    for line in http.get("/metrics").text.splitlines():
        if line.startswith(f'instep_requests_failed_total{{model="{model}",reason="cancelled"}}'):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(
    http: httpx.Client,
    url: str,
    server: Server,
    log: pytest.LogCaptureFixture,  # noqa: F811
    stream: bool,
) -> None:
    before = cancelled(http)
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "!slow 60", "num_inference_steps": 50, "stream": stream}
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=0.3)
    eventually(lambda: cancelled(http) == before + 1)
    eventually(lambda: server.supervisor.running + server.supervisor.waiting == 0)
    (line,) = [line for line in lines(log, 1) if line["path"] == "/v1/images/generations"]
    assert (line["status"], line["error"]) == (499, "cancelled")


SLOW = "!slow 60"
COMPARED = {"models": ["tiny-text"], "prompt": [SLOW, SLOW, SLOW]}
FAILING = {"models": ["tiny-text"], "prompt": ["!nan", "!oom", SLOW]}
LEFT = {
    "an image": ("generations", {"prompt": SLOW, "n": 3}, "application/json"),
    "raw bytes": ("generations", {"prompt": SLOW}, "image/png"),
    "a stream": ("generations", {"prompt": SLOW, "n": 3, "stream": True}, "application/json"),
    "previews": ("generations", {"prompt": SLOW, "stream": True, "partial_images": 3}, "application/json"),
    "steps": ("generations", {"prompt": SLOW, "stream": True, "progress": True}, "application/json"),
    "a batch": ("batch", {"prompt": SLOW, "progress": True}, "application/json"),
    "a comparison": ("compare", COMPARED, "application/json"),
    "a panel": ("compare", COMPARED, "image/png"),
    "a comparison that fails": ("compare", FAILING, "application/json"),
}
"""What a client leaves in the middle: route, body (of a batch, that of each of its requests) and Accept."""


def whole(route: str, body: dict[str, object]) -> dict[str, object]:
    return {"requests": [body] * 3} if route == "batch" else body


@pytest.mark.parametrize("what", LEFT)
@pytest.mark.parametrize("reset", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["closed", "reset"])
def test_leaving_is_no_error_of_the_server(
    url: str,
    server: Server,
    log: pytest.LogCaptureFixture,  # noqa: F811
    what: str,
    reset: bool,
) -> None:
    """No line above info, no traceback, from whatever logger; and nothing goes on being drawn."""
    route, body, accept = LEFT[what]
    log.set_level(logging.INFO)
    sent = json.dumps(whole(route, {"num_inference_steps": 50, **body})).encode()
    head = f"POST /v1/images/{route} HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\nContent-Length: {len(sent)}\r\n\r\n"
    with connect(url) as wire:
        wire.sendall(head.encode() + sent)
        eventually(lambda: server.supervisor.running > 0 or "fails" in what)
        time.sleep(0.1)
        if reset:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: server.supervisor.running + server.supervisor.waiting == 0)
    (line,) = [line for line in lines(log, 1) if line["path"] == f"/v1/images/{route}"]
    assert line["status"] == (500 if "fails" in what else 499)
    gc.collect()  # an exception that nobody took is logged when its future is collected
    time.sleep(0.05)
    assert [record for record in log.records if record.levelno > logging.INFO or record.exc_info] == []


@pytest.mark.parametrize("what", LEFT)
def test_pictures_go_with_their_answer_without_a_garbage_collector(http: httpx.Client, what: str) -> None:
    """They are megabytes each, which it does not see, and a request of some seconds is old to it: it comes late."""
    route, body, accept = LEFT[what]
    prompt = ["a cat", "a dog"] if route == "compare" else "a cat"
    sent = whole(route, {**body, "prompt": prompt, "num_inference_steps": 4})
    headers = {"Accept": accept}
    gc.collect()
    gc.disable()
    try:
        before = len(pictures())
        for _ in range(3):
            assert http.post(f"/v1/images/{route}", json=sent, headers=headers).status_code == 200
        eventually(lambda: len(pictures()) <= before)
    finally:
        gc.enable()


def pictures() -> list[Result]:
    return [one for one in gc.get_objects() if type(one) is Result]


def test_a_client_that_leaves_before_its_body_is_whole_is_counted(http: httpx.Client, url: str) -> None:
    before = cancelled(http, model="")
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
    with connect(url) as sock:
        sock.sendall(head)
        time.sleep(0.1)
    eventually(lambda: cancelled(http, model="") == before + 1)


def test_a_client_that_leaves_hurts_nobody_else(http: httpx.Client, url: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/generations", json={"prompt": "!slow 60"}, timeout=0.2)
    assert generate(http, {"prompt": "a cat"}).status_code == 200


def test_the_worker_dies_and_the_service_goes_on(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_DELAY", 0.05)
    before = server.supervisor.restarts
    reply = generate(http, {"prompt": "!die"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "crashed")
    assert "retry-after" not in reply.headers and reply.headers["x-should-retry"] == "false"
    assert http.get("/healthz").status_code == 200
    eventually(lambda: http.get("/readyz").status_code == 200)
    assert generate(http, {"prompt": "a"}).status_code == 200
    assert f"instep_worker_restarts_total {before + 2}.0" in http.get("/metrics").text
