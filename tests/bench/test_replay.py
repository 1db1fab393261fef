"""The client is open loop: what is sent does not wait for what was sent before."""

from __future__ import annotations

import asyncio
import json

from app.bench.replay import LOST, PNG, Address, Answer, closed_loop, open_loop
from app.bench.trace import Arrival


class Slow:
    """Answers nobody until all have asked; notes the order in which they came."""

    def __init__(self, expected: int, reply: bytes) -> None:
        self.expected, self.reply = expected, reply
        self.seen: list[int] = []
        self.all = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        self.seen.append(json.loads(await reader.readexactly(length))["seed"])
        if len(self.seen) == self.expected:
            self.all.set()
        await self.all.wait()
        writer.write(self.reply)
        await writer.drain()
        writer.close()


def reply(body: bytes, status: int = 200, length: int | None = None) -> bytes:
    head = f"HTTP/1.1 {status} x\r\ncontent-length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


ARRIVALS = [Arrival(number / 50, "short", {"seed": number}) for number in range(6)]


def run(answer: bytes, closed: bool = False) -> tuple[list[int], list[Answer]]:
    async def both() -> tuple[list[int], list[Answer]]:
        slow = Slow(len(ARRIVALS), answer)
        server = await asyncio.start_server(slow, "127.0.0.1", 0)
        address: Address = server.sockets[0].getsockname()[:2]
        async with server:
            loop = closed_loop(address, ARRIVALS) if closed else open_loop(address, ARRIVALS)
            answers = await asyncio.wait_for(loop, 30)
        return slow.seen, answers[1] if closed else answers

    return asyncio.run(both())


def test_later_requests_are_sent_while_the_first_is_unanswered() -> None:
    seen, answers = run(reply(PNG + b"x"))
    assert sorted(seen) == list(range(6))
    assert [one.arrival for one in answers] == ARRIVALS
    assert all(one.status == 200 and 0 <= one.late < one.seconds for one in answers)


def test_a_closed_loop_has_all_queued_at_once() -> None:
    seen, answers = run(reply(PNG), closed=True)
    assert sorted(seen) == list(range(6)) and {one.arrival.at for one in answers} == {0.0}


def test_only_a_whole_picture_counts() -> None:
    for answer, status in ((reply(b"{}", 503), 503), (reply(b"{}"), LOST), (reply(PNG, length=99), LOST), (b"", LOST)):
        assert {one.status for one in run(answer)[1]} == {status}
