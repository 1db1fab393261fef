"""The table of errors is complete and tells nothing it should not."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from app import errors
from app.api.errors import error_response

CODES: tuple[errors.Code, ...] = get_args(errors.Code)
NOT_FINITE = errors.EngineError("/secret/path: CUDA error 700", code="non_finite_output")
FAILURES = (errors.InstepError, errors.EngineError, errors.CheckpointError)


def answer(error: errors.InstepError) -> tuple[int, dict[str, str], dict[str, str | None]]:
    response = error_response(error)
    return response.status_code, dict(response.headers), json.loads(bytes(response.body))["error"]


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_told_in_the_envelope(code: errors.Code) -> None:
    for kind in (errors.InstepError, errors.RateLimited, errors.Unavailable):
        status, headers, body = answer(kind("it went wrong", code=code, param="field"))
        assert 400 <= status < 600
        assert set(body) == {"message", "type", "param", "code"}
        assert body["message"] and body["type"] and body["code"] == code
        assert ("retry-after" in headers) == (kind is not errors.InstepError)


@pytest.mark.parametrize("error", [*(kind("/secret/path: CUDA error 700") for kind in FAILURES), NOT_FINITE])
def test_a_failure_inside_is_told_in_fixed_words(error: errors.InstepError) -> None:
    _, headers, body = answer(error)
    assert "secret" not in str(body) and "CUDA" not in str(body)
    assert headers["x-should-retry"] == "false"


def test_what_is_not_downloaded_is_told_with_the_command_that_gets_it() -> None:
    _, headers, body = answer(errors.NotDownloaded("a: not downloaded: run `instep models pull a`"))
    assert "instep models pull a" in str(body["message"]) and headers["x-should-retry"] == "false"


def test_a_subclass_has_its_parents_code() -> None:
    class Fuller(errors.RateLimited):
        """More than full."""

    assert answer(Fuller("full"))[2]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(("seconds", "header"), [(None, "1"), (0.0, "1"), (2.2, "3"), (500.0, "120")])
def test_retry_after(seconds: float | None, header: str) -> None:
    status, headers, _ = answer(errors.Unavailable("full", retry_after=seconds, code="overloaded"))
    assert (status, headers["retry-after"], headers["x-should-retry"]) == (503, header, "true")


STATUSES: dict[errors.Code, int] = {
    "internal_error": 500,
    "invalid_request": 400,
    "invalid_value": 400,
    "unknown_parameter": 400,
    "unsupported_parameter": 400,
    "invalid_json": 400,
    "not_acceptable": 406,
    "unsupported_encoding": 415,
    "body_too_large": 413,
    "headers_too_large": 431,
    "request_timeout": 408,
    "invalid_api_key": 401,
    "not_allowed": 403,
    "rate_limit_exceeded": 429,
    "model_not_found": 404,
    "unavailable": 503,
    "overloaded": 503,
    "no_worker": 503,
    "shutting_down": 503,
    "deadline_exceeded": 504,
    "cancelled": 499,
    "insufficient_gpu_memory": 507,
    "non_finite_output": 500,
    "crashed": 500,
    "model_load_failed": 503,
    "lora_load_failed": 503,
    "model_not_downloaded": 503,
}


def test_every_code_has_its_status_here() -> None:
    assert set(CODES) == set(STATUSES)


@pytest.mark.parametrize(("code", "status"), STATUSES.items())
def test_statuses(code: errors.Code, status: int) -> None:
    got, headers, body = answer(errors.InstepError("x", code=code))
    assert (got, body["code"]) == (status, code)
    assert headers.get("www-authenticate") == ("Bearer" if code == "invalid_api_key" else None)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InstepError, "internal_error"),
        (errors.RequestError, "invalid_request"),
        (errors.InvalidValue, "invalid_value"),
        (errors.RateLimited, "rate_limit_exceeded"),
        (errors.ModelNotFound, "model_not_found"),
        (errors.Unavailable, "unavailable"),
        (errors.DeadlineExceeded, "deadline_exceeded"),
        (errors.Cancelled, "cancelled"),
        (errors.OutOfMemory, "insufficient_gpu_memory"),
        (errors.EngineError, "internal_error"),
        (errors.LoadError, "model_load_failed"),
        (errors.CardError, "model_load_failed"),
        (errors.CheckpointError, "model_load_failed"),
        (errors.NotDownloaded, "model_not_downloaded"),
        (errors.SettingsError, "internal_error"),
    ],
)
def test_codes(kind: type[errors.InstepError], code: str) -> None:
    assert kind("x").code == code


def test_a_lone_surrogate_in_an_error_is_escaped() -> None:
    assert answer(errors.RequestError("\ud800", param="\ud800", code="unknown_parameter"))[2]["param"] == "\\ud800"
