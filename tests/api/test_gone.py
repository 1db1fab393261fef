"""Clients that leave: their requests are cancelled at the next step, and nobody else's."""

from __future__ import annotations

import logging

import httpx
import pytest

from tests.api.conftest import Server, eventually, generate
from tests.api.test_access import lines


def cancelled(http: httpx.Client) -> float:
    for line in http.get("/metrics").text.splitlines():
        if line.startswith('instep_requests_failed_total{model="tiny-text",reason="cancelled"}'):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(
    http: httpx.Client, url: str, server: Server, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO, logger="instep.access")
    before = cancelled(http)
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "!slow 60", "num_inference_steps": 50, "stream": stream}
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=0.3)
    eventually(lambda: cancelled(http) == before + 1)
    eventually(lambda: server.supervisor.running + server.supervisor.waiting == 0)
    (line,) = [line for line in lines(caplog, 1) if line["path"] == "/v1/images/generations"]
    assert (line["status"], line["error"]) == (499, "cancelled")


def test_a_client_that_leaves_hurts_nobody_else(http: httpx.Client, url: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images/generations", json={"prompt": "!slow 60"}, timeout=0.2)
    assert generate(http, {"prompt": "a cat"}).status_code == 200


def test_the_worker_dies_and_the_service_goes_on(http: httpx.Client, server: Server) -> None:
    before = server.supervisor.restarts
    reply = generate(http, {"prompt": "!die"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker")
    assert int(reply.headers["retry-after"]) >= 1 and reply.headers["x-should-retry"] == "true"
    assert http.get("/healthz").status_code == 200
    eventually(lambda: http.get("/readyz").status_code == 200)
    assert generate(http, {"prompt": "a"}).status_code == 200
    assert f"instep_worker_restarts_total {before + 1}.0" in http.get("/metrics").text
