"""Bytes to JSON, strictly, and Accept headers to a format."""

from __future__ import annotations

import pytest
from fastapi import Request

from app.api.front import accepted_format, parse_json
from tests.parts.requests import refused


def test_json_in_any_of_its_encodings() -> None:
    assert parse_json('{"prompt": "ä"}'.encode()) == {"prompt": "ä"}
    assert parse_json('{"prompt": "ä"}'.encode("utf-16")) == {"prompt": "ä"}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff\xfe\xfd", b"prompt=a", b"[" * 4000, b'{"a":' * 4000,
        b'{"n": 1' + b"0" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_not_json(data: bytes) -> None:
    with refused("invalid_json") as caught:
        parse_json(data)
    assert len(caught.value.message) < 100


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("", None), ("*/*", None), ("application/json", None), ("text/html", None), ("application/*", None),
        ("image/png", "png"), ("IMAGE/PNG", "png"), ("image/webp", "webp"), ("image/jpeg;q=0.5", "jpeg"),
        ("image/webp, image/png", "webp"), ("image/webp;q=0.1, image/png;q=0.9", "png"),
        ("application/json;q=0.5, image/png", "png"), ("image/png;q=0.5, application/json", None),
        ("image/png, */*;q=0.1", "png"), ("image/png;q=0", None), ("image/png;q=x", None), (";;,=,q=", None),
        ("image/*", "png"), ("image/*;q=0.2", "png"), ("image/*, */*;q=0.1", "png"), ("*/*, image/*", None),
        ("image/webp;q=0.8, image/*", "png"), ("image/webp, image/*;q=0.8", "webp"), ("image/png;q=0, image/*", "jpeg"),
        ("image/*;q=0.5, application/json;q=0.6", None), ("image/gif, image/*;q=0.5", "png"), ("image/gif, */*", None),
        ("image/gif;q=0", None), ("image/png; profile=x", "png"), ("image/*;q=0, */*", None),
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "webp"),  # an <img> of a browser
    ],
)  # fmt: skip
def test_accept(accept: str, format: str | None) -> None:
    assert accepted_format(asking(accept)) == format


def asking(accept: str) -> Request:
    return Request({"type": "http", "headers": [(b"accept", accept.encode())]})


@pytest.mark.parametrize("preferred", ["png", "jpeg", "webp"])
def test_any_image_is_the_one_that_the_body_asks_for(preferred: str) -> None:
    assert accepted_format(asking("image/*"), preferred) == preferred
    assert accepted_format(asking("image/png, image/*;q=0.5"), preferred) == "png"


@pytest.mark.parametrize(
    "accept", ["image/gif", "image/avif, image/svg+xml;q=0.5", "image/jpg", "image/gif, text/html"]
)
def test_an_image_type_that_is_not_written_is_an_error_that_names_those_that_are(accept: str) -> None:
    with refused("not_acceptable", match="image/png, image/jpeg, image/webp and application/json"):
        accepted_format(asking(accept))
