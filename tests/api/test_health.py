"""Live, ready, metrics and docs."""

from __future__ import annotations

import httpx
import pytest

from app.metrics import CONTENT_TYPE
from tests.parts.servers import generate

BASIC = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "request_queue_time_seconds",
    "e2e_request_latency_seconds",
    "text_encode_seconds",
    "denoise_step_seconds",
    "vae_encode_seconds",
    "vae_decode_seconds",
    "image_encode_seconds",
    "batch_rows",
    "batch_passes",
    "padding_passes_total",
    "images_total",
    "requests_failed_total",
    "requests_rejected_total",
    "requests_replayed_total",
    "model_loaded",
    "model_load_seconds",
    "worker_restarts_total",
)


@pytest.mark.parametrize("path", ["/health", "/healthz"])
def test_live(http: httpx.Client, path: str) -> None:
    reply = http.get(path)
    assert (reply.status_code, reply.json()["status"], reply.json()["ready"]) == (200, "ok", True)


def test_ready(http: httpx.Client) -> None:
    assert http.get("/readyz").status_code == 200


def test_the_basic_set_of_metrics_is_there(http: httpx.Client) -> None:
    assert generate(http, {"prompt": "a", "n": 2}).status_code == 200
    reply = http.get("/metrics")
    assert reply.headers["content-type"] == CONTENT_TYPE
    for name in BASIC:
        assert f"# HELP instep_{name} " in reply.text.replace("_total ", " ") or f"# HELP instep_{name} " in reply.text
    assert 'instep_model_loaded{model="tiny-text"} 1.0' in reply.text
    assert 'instep_num_requests_running{model="tiny-text"} 0.0' in reply.text
    for reason in ("queue", "engine"):
        assert f'instep_num_requests_waiting_by_reason{{model="tiny-text",reason="{reason}"}} 0.0' in reply.text
    assert 'instep_requests_replayed_total{model="tiny-text"} ' in reply.text


def test_a_refused_request_is_counted_without_the_name_it_made_up(http: httpx.Client) -> None:
    generate(http, {"prompt": "a", "model": "x" * 50})
    generate(http, {"prompt": "a", "n": 99})
    text = http.get("/metrics").text
    assert 'instep_requests_rejected_total{model="",reason="model_not_found"}' in text
    assert 'instep_requests_rejected_total{model="tiny-text",reason="invalid_value"}' in text
    assert "xxxxx" not in text


def test_docs_are_served(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == 200
    assert http.get("/openapi.json").json()["info"]["title"] == "Instep"
