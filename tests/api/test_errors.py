"""The table of errors is complete and tells nothing it should not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from app import errors
from app.api.errors import error_response


def tree(kind: type[errors.InstepError]) -> Iterator[type[errors.InstepError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


KINDS = [kind for kind in tree(errors.InstepError) if kind.__module__ == "app.errors"]


def answer(error: errors.InstepError) -> tuple[int, dict[str, str], dict[str, str | None]]:
    response = error_response(error)
    return response.status_code, dict(response.headers), json.loads(bytes(response.body))["error"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_is_told_in_the_envelope(kind: type[errors.InstepError]) -> None:
    status, headers, body = answer(kind("it went wrong", param="field"))
    assert 400 <= status < 600
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"] and body["type"] and body["code"]
    assert ("retry-after" in headers) == issubclass(kind, (errors.Unavailable, errors.RateLimited))


@pytest.mark.parametrize(
    "kind", [errors.InstepError, errors.EngineError, errors.NonFiniteOutput, errors.CheckpointError]
)
def test_a_failure_inside_is_told_in_fixed_words(kind: type[errors.InstepError]) -> None:
    _, headers, body = answer(kind("/secret/path: CUDA error 700"))
    assert "secret" not in str(body) and "CUDA" not in str(body)
    assert headers["x-should-retry"] == "false"


def test_what_is_not_downloaded_is_told_with_the_command_that_gets_it() -> None:
    _, headers, body = answer(errors.NotDownloaded("a: not downloaded: run `instep models pull a`"))
    assert "instep models pull a" in str(body["message"]) and headers["x-should-retry"] == "false"


def test_a_subclass_that_is_not_in_the_table_is_told_as_its_parent() -> None:
    class Fuller(errors.Overloaded):
        """More than full."""

    assert answer(Fuller("full"))[2]["code"] == "overloaded"


@pytest.mark.parametrize(("seconds", "header"), [(None, "1"), (0.0, "1"), (2.2, "3"), (500.0, "120")])
def test_retry_after(seconds: float | None, header: str) -> None:
    status, headers, _ = answer(errors.Overloaded("full", retry_after=seconds))
    assert (status, headers["retry-after"], headers["x-should-retry"]) == (503, header, "true")


STATUSES: list[tuple[type[errors.InstepError], int, str]] = [
    (errors.InstepError, 500, "internal_error"),
    (errors.RequestError, 400, "invalid_request"),
    (errors.InvalidValue, 400, "invalid_value"),
    (errors.UnknownField, 400, "unknown_parameter"),
    (errors.Unsupported, 400, "unsupported_parameter"),
    (errors.InvalidJSON, 400, "invalid_json"),
    (errors.NotAcceptable, 406, "not_acceptable"),
    (errors.UnsupportedEncoding, 415, "unsupported_encoding"),
    (errors.BodyTooLarge, 413, "body_too_large"),
    (errors.HeadersTooLarge, 431, "headers_too_large"),
    (errors.RequestTimeout, 408, "request_timeout"),
    (errors.Unauthorized, 401, "invalid_api_key"),
    (errors.Forbidden, 403, "not_allowed"),
    (errors.RateLimited, 429, "rate_limit_exceeded"),
    (errors.ModelNotFound, 404, "model_not_found"),
    (errors.Unavailable, 503, "unavailable"),
    (errors.Overloaded, 503, "overloaded"),
    (errors.NoWorker, 503, "no_worker"),
    (errors.ShuttingDown, 503, "shutting_down"),
    (errors.DeadlineExceeded, 504, "deadline_exceeded"),
    (errors.Cancelled, 499, "cancelled"),
    (errors.OutOfMemory, 507, "insufficient_gpu_memory"),
    (errors.DoesNotFit, 507, "insufficient_gpu_memory"),
    (errors.NonFiniteOutput, 500, "non_finite_output"),
    (errors.EngineError, 500, "internal_error"),
    (errors.LoadError, 503, "model_load_failed"),
    (errors.CardError, 503, "model_load_failed"),
    (errors.CheckpointError, 503, "model_load_failed"),
    (errors.NotDownloaded, 503, "model_not_downloaded"),
    (errors.SettingsError, 500, "internal_error"),
]


def test_every_class_of_error_has_its_status_here() -> None:
    assert set(KINDS) == {kind for kind, _, _ in STATUSES}


@pytest.mark.parametrize(("kind", "status", "code"), STATUSES)
def test_statuses(kind: type[errors.InstepError], status: int, code: str) -> None:
    got, _, body = answer(kind("x"))
    assert (got, body["code"]) == (status, code)


@pytest.mark.parametrize("kind", KINDS)
def test_who_lacks_a_key_is_told_how_to_send_one(kind: type[errors.InstepError]) -> None:
    assert answer(kind("x"))[1].get("www-authenticate") == ("Bearer" if kind is errors.Unauthorized else None)


def test_a_lone_surrogate_in_an_error_is_escaped() -> None:
    assert answer(errors.UnknownField("\ud800", param="\ud800"))[2]["param"] == "\\ud800"
