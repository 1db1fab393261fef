"""Bytes to JSON, strictly."""

from __future__ import annotations

import pytest

from app.api.reading import parse_json
from app.errors import InvalidJSON


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
    with pytest.raises(InvalidJSON) as caught:
        parse_json(data)
    assert len(caught.value.message) < 100
