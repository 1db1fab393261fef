"""Splicing: the same JSON as with the files in it from the start."""

from __future__ import annotations

import base64
import json

import pytest
from pydantic import BaseModel

from app.jobs.replies import MARK, SLICE, spliced


class Reply(BaseModel):
    text: str
    files: list[str]
    absent: int | None = None


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE + 2])
def test_the_same_as_base64_of_the_whole(size: int) -> None:
    files = [bytes(range(256)) * (size // 256 + 1), b"\xff" * size, b""]
    files[0] = files[0][:size]
    whole = [base64.b64encode(file).decode() for file in files]
    reply = Reply(text='0. \u2028 " {', files=[MARK] * 3)
    plain = Reply(text=reply.text, files=whole)
    assert spliced(reply, files) == plain.model_dump_json(exclude_none=True).encode()
    assert json.loads(spliced(reply, files))["files"] == whole
