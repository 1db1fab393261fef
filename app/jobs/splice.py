"""Splice: files into the JSON of a reply, as base64, a slice at a time.

Knows nothing of what the reply says. One string of a whole file, and then of a whole reply, holds the interpreter lock
for as long as it takes to make, and the event loop with it: over 10 ms for eight large PNGs (tests/bench/encode.py).
"""

from __future__ import annotations

import binascii
import secrets
from collections.abc import Sequence

from pydantic import BaseModel

SLICE = 3 * 2**16
"""Bytes of a file that become base64 in one call; a multiple of three, so that only the last is padded."""

_MARK = secrets.token_hex(16)


def mark(place: int) -> str:
    """What stands in a reply for the file of this place. Nobody outside this process can write one."""
    return f"{_MARK}-{place}."


def spliced(reply: BaseModel, files: Sequence[bytes]) -> bytes:
    """The JSON of a reply, without absent fields, each mark replaced by its file; marks stand in order of place."""
    rest, parts = reply.model_dump_json(exclude_none=True).encode(), []
    for place, file in enumerate(files):
        before, _, rest = rest.partition(mark(place).encode())
        parts.append(before)
        slices = (file[start : start + SLICE] for start in range(0, len(file), SLICE))
        parts += [binascii.b2a_base64(part, newline=False) for part in slices]
    return b"".join([*parts, rest])
