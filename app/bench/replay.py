"""Replay: a client that sends each request at its time, whatever became of the others, and notes what came back.

Knows nothing of the server but its address; HTTP/1.1 by hand, a connection a request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from app.bench.trace import Arrival

Address = tuple[str, int]
PNG = b"\x89PNG\r\n\x1a\n"
LOST = 0
"""The status of a request whose connection broke, or whose answer was cut or was no picture."""


class Answer(NamedTuple):
    """What became of one request. late: seconds that the client sent it late; seconds: from its own time to its last
    byte, with these; status: 200 for a whole picture."""

    arrival: Arrival
    late: float
    seconds: float
    status: int


async def ask(address: Address, arrival: Arrival) -> tuple[int, bytes]:
    """The status and the body of one request over its own connection."""
    try:
        reader, writer = await asyncio.open_connection(*address)
        try:
            body = json.dumps(arrival.body).encode()
            head = (
                f"POST /v1/images/generations HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nAccept: image/png\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            said = await reader.read()
        finally:
            writer.close()
    except OSError:
        return LOST, b""
    first, _, rest = said.partition(b"\r\n\r\n")
    words = first.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else LOST
    cut = f"content-length: {len(rest)}".encode() not in first.lower().split(b"\r\n")
    return (LOST if status == 200 and (cut or not rest.startswith(PNG)) else status), rest


async def open_loop(address: Address, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Each request at its time; the answers in order of the arrivals."""
    start = time.perf_counter()

    async def one(arrival: Arrival) -> Answer:
        late = time.perf_counter() - start - arrival.at
        status, _ = await ask(address, arrival)
        return Answer(arrival, late, time.perf_counter() - start - arrival.at, status)

    tasks = []
    for arrival in arrivals:
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(arrival)))
    return await asyncio.gather(*tasks)


async def closed_loop(address: Address, arrivals: Sequence[Arrival]) -> tuple[float, list[Answer]]:
    """All at once, whatever their times: pictures a second until the last of them, and the answers."""
    start = time.perf_counter()
    answers = await open_loop(address, [arrival._replace(at=0.0) for arrival in arrivals])
    done = sum(answer.status == 200 for answer in answers)
    return done / (time.perf_counter() - start), answers
