"""A server under load: an open loop that waits for nobody, latencies by class, and the command from end to end."""

from __future__ import annotations

import asyncio
import json

import pytest

from app.bench.serve import LOST, PNG, Answer, Arrival, latencies, open_loop
from tests.parts.commands import Run


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


def send(answer: bytes) -> tuple[list[int], list[Answer]]:
    async def both() -> tuple[list[int], list[Answer]]:
        slow = Slow(len(ARRIVALS), answer)
        server = await asyncio.start_server(slow, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            answers = await asyncio.wait_for(open_loop(url, ARRIVALS), 30)
        return slow.seen, answers

    return asyncio.run(both())


def test_later_requests_are_sent_while_the_first_is_unanswered() -> None:
    seen, answers = send(reply(PNG + b"x"))
    assert sorted(seen) == list(range(6))
    assert [one.arrival for one in answers] == ARRIVALS
    assert all(one.status == 200 and 0 <= one.late < one.seconds for one in answers)


def test_only_a_whole_picture_counts() -> None:
    for answer, status in ((reply(b"{}", 503), 503), (reply(b"{}"), LOST), (reply(PNG, length=99), LOST), (b"", LOST)):
        assert {one.status for one in send(answer)[1]} == {status}


def test_latencies_by_class_and_what_was_in_time() -> None:
    short, long = Arrival(0, "short", {"steps": 1}), Arrival(0, "long", {"steps": 9})
    given = [Answer(short, 0, 1.0, 200), Answer(short, 0, 4.0, 200), Answer(long, 0, 4.0, 200), Answer(long, 0, 1, 503)]
    found = latencies(given, {short.work: 1.0, long.work: 1.5})
    assert list(found) == ["all", "long", "short"]
    assert found["short"] == {
        "count": 2, "p50": 2.5, "p95": pytest.approx(3.85), "p99": pytest.approx(3.97), "mean": 2.5, "attainment": 0.5,
    }  # fmt: skip
    assert found["long"]["p50"] == 4.0 and found["long"]["attainment"] == 0.5 == found["all"]["attainment"]


@pytest.mark.slow
def test_the_command_answers_every_request(run: Run) -> None:
    words = ("--model", "tiny-sd3", "--mix", "homogeneous", "--queued", 4, "--rounds", 1, "--seconds", 3)
    result = run("bench", "serve", *words)
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["bench"] == "serve" and found["statuses"] == {"200": 4 + found["requests"]}
    assert found["latency"]["all"]["count"] == found["requests"] and found["capacity"]["median"] > 0
    forwards = 20 * (4 + found["requests"]) / found["rows"]
    assert forwards == pytest.approx(round(forwards)) and found["rows"] >= 1, "the 20 steps of these, and no others"
    assert found["rate"] == pytest.approx(0.9 * found["capacity"]["median"])
    assert found["commit"] is not None and "images/s" in result.stdout
