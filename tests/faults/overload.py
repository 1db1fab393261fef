"""Ten times the load that a server can take, for minutes: `python -m tests.faults.overload --seconds 120`.

A real `instep serve` on a loopback port. The capacity is measured again and again, with clients that wait for answers.
Between, requests come as a Poisson process that waits for nobody, half of them on connections that are kept and half on
new ones. It ends in one JSON line: goodput beside capacity, milliseconds of the refusals on either kind of connection,
and what the memory of both processes has grown by.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import httpx

from tests.bench.growth import resident
from tests.bench.overload import FILL, MODELS, SAMPLE
from tests.faults.soak import children
from tests.parts.servers import INSTEP, Process

FACTOR = 10
MAX_WAIT = 8.0
SLICE = 30.0
"""Seconds of the flood between two measurements of the capacity."""

CLIENTS = 16
"""Clients that wait for their answers while the capacity is measured."""

WANTED = {"model": "emoji-mmdit", "prompt": "a red apple", "num_inference_steps": 12, "seed": 1}
"""One kind of request: of several, an overloaded server takes the short ones, and images a second mean nothing."""

PATIENCE = 100.0
"""Seconds after which an answer counts as hanging."""


@dataclass(frozen=True)
class Answer:
    """status: of HTTP, 0 where none came. code: of an error. retry_after: what a refusal says. at: when it came."""

    kept: bool
    status: int
    code: str
    retry_after: str | None
    seconds: float
    at: float

    @property
    def refused(self) -> bool:
        return self.status in (429, 503) and self.retry_after is not None and int(self.retry_after) >= 1


class Flood:
    """Requests with this body."""

    def __init__(self, url: str, wanted: Mapping[str, Any] = WANTED) -> None:
        self.url, self.wanted = url, wanted
        self.dice = random.Random(1)

    async def capacity(self) -> float:
        """Images a second of a device that always has work."""
        begin, done = time.perf_counter() + FILL, 0

        async def client(http: httpx.AsyncClient) -> None:
            nonlocal done
            while time.perf_counter() - begin < SAMPLE:
                answer = await self._ask(http, kept=True)
                done += answer.status == 200 and begin <= answer.at < begin + SAMPLE

        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as http:
            await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
        return done / SAMPLE

    async def run(self, rate: float, seconds: float) -> list[Answer]:
        """Send `rate` requests a second for so many seconds. Returns all answers once they are there."""
        kept, fresh = (httpx.Limits(max_connections=None, max_keepalive_connections=most) for most in (None, 0))
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(httpx.AsyncClient(base_url=self.url, limits=limits, timeout=PATIENCE))
                for limits in (kept, fresh)
            ]
            tasks, start, due = [], time.perf_counter(), 0.0
            while (due := due + self.dice.expovariate(rate)) < seconds:
                await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
                place = len(tasks) % 2
                tasks.append(asyncio.create_task(self._ask(clients[place], kept=place == 0)))
            return await asyncio.gather(*tasks)

    async def _ask(self, http: httpx.AsyncClient, kept: bool) -> Answer:
        start = time.perf_counter()
        try:
            reply = await http.post("/v1/images/generations", json=self.wanted, headers={"Accept": "image/png"})
        except httpx.HTTPError as error:
            now = time.perf_counter()
            return Answer(kept, 0, type(error).__name__, None, now - start, now)
        now = time.perf_counter()
        code = "" if reply.status_code == 200 else reply.json()["error"]["code"]
        return Answer(kept, reply.status_code, code, reply.headers.get("retry-after"), now - start, now)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts by status and code, and milliseconds of the refusals on either kind of connection."""
    found: dict[str, Any] = {
        "sent": len(answers),
        "answers": dict(Counter(f"{answer.status} {answer.code}".strip() for answer in answers)),
    }
    for name, kept in (("kept", True), ("new", False)):
        times = sorted(1000 * answer.seconds for answer in answers if answer.refused and answer.kept is kept)
        shares = (("p50", 0.5), ("p99", 0.99), ("most", 1.0))
        found[f"refusal_ms_{name}"] = {
            share: round(times[min(len(times) - 1, int(part * len(times)))], 1) for share, part in shares if times
        }
    return found


def processor_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, pids: dict[str, int], seconds: float) -> dict[str, Any]:
    """Slices of the flood between measurements of the capacity, so that a busy neighbour slows both."""
    flood, answers, goodput, front = Flood(url), list[Answer](), list[float](), 0.0
    capacity = [await flood.capacity()]
    rate = FACTOR * capacity[0]
    await flood.run(rate, MAX_WAIT)
    before = {name: resident(pid) for name, pid in pids.items()}
    most = dict(before)
    for _ in range(math.ceil(seconds / SLICE)):
        start, spent = time.perf_counter() + FILL, processor_seconds(pids["front"])
        running = asyncio.ensure_future(flood.run(rate, FILL + SLICE))
        while not running.done():
            await asyncio.wait({running}, timeout=1.0)
            most = {name: max(most[name], resident(pid)) for name, pid in pids.items()}
        answers += (new := await running)
        front += processor_seconds(pids["front"]) - spent
        goodput.append(sum(one.status == 200 and start <= one.at < start + SLICE for one in new) / SLICE)
        capacity.append(await flood.capacity())
    return {
        "capacity": [round(one, 2) for one in capacity],
        "goodput": [round(one, 2) for one in goodput],
        "share": round(mean(goodput) / mean(map(mean, pairwise(capacity))), 3),
        **summary(answers),
        "front_ms_per_request": round(1000 * front / len(answers), 2),
        "grown_mb": {name: round(most[name] - before[name], 1) for name in pids},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    flags = (
        "--models",
        str(MODELS),
        "--devices",
        "cpu",
        "--port",
        "0",
        "--preload",
        "all",
        "--max-wait",
        str(MAX_WAIT),
    )
    with Process((*INSTEP, "serve", *flags)) as server:
        server.wait_ready()
        front = server.process.pid
        (engine,) = children(front)
        found = asyncio.run(measure(server.url, {"front": front, "engine": engine}, options.seconds))
        server.stop()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    facts = {"bench": "overload", "date": str(date.today()), "machine": machine, "seconds": options.seconds}
    print(json.dumps({**facts, **found}))


if __name__ == "__main__":
    main()
