"""What an overloaded server is still good for: `python -m tests.bench.overload`. Ends by itself, in one JSON line.

A real `instep serve` on a loopback port, twice: once with MAX_WAIT, a key for each client and the clients' deadlines,
once with a queue without end and one key for all. Requests come at 2 and at 10 times the capacity that was measured
just before, as a Poisson process that waits for nobody; one client sends nine of ten, three others the rest. An image
counts when it is there within the client's patience. Clients do not try again, and hold on for three times their
patience, as behind a proxy that does not tell when they leave.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import httpx

from tests.parts.servers import INSTEP, Process

MODELS = Path(__file__).parents[2] / "models"
CLIENTS = ("flood", "small-1", "small-2", "small-3")
FLOOD = 0.9
FACTORS = (2, 10)
HOLD = 3
FILL, SAMPLE = 5.0, 10.0
"""Seconds until the device is full, and then for which the capacity is measured."""


@dataclass(frozen=True)
class Answer:
    """status: 200, the code of a refusal, or "gone" for a client that gave up."""

    client: str
    status: str
    seconds: float


def body(dice: random.Random) -> dict[str, object]:
    """Short and long, with guidance and without."""
    steps, guidance = dice.choice((4, 8, 12, 20)), dice.choice((0, 4.0))
    return {"prompt": "a red apple", "num_inference_steps": steps, "guidance_scale": guidance, "seed": 1}


@contextmanager
def serving(max_wait: float, keys: Path | None) -> Iterator[str]:
    """A server process and its address, once its model is loaded and measured."""
    flags = ["--models", str(MODELS), "--devices", "cpu", "--port", "0", "--preload", "all", "--drain", "0"]
    flags += ["--max-wait", str(max_wait), *(["--api-keys-file", str(keys)] if keys else [])]
    with Process((*INSTEP, "serve", *flags), **os.environ) as server:
        server.wait_ready()
        yield server.url
        server.stop()


class Crowd:
    """Clients of one server. named: each sends its own key and its patience, else all are one and say nothing."""

    def __init__(self, http: httpx.AsyncClient, named: bool, patience: float) -> None:
        self.http, self.named, self.patience = http, named, patience

    async def ask(self, client: str, wanted: dict[str, object]) -> Answer:
        headers = {"Accept": "image/png"}
        if self.named:
            headers |= {"Authorization": f"Bearer {key_of(client)}", "x-stainless-read-timeout": str(self.patience)}
        start = time.perf_counter()
        try:
            reply = await self.http.post("/v1/images/generations", json=wanted, headers=headers)
        except httpx.TimeoutException:
            return Answer(client, "gone", time.perf_counter() - start)
        seconds = time.perf_counter() - start
        return Answer(client, "200" if reply.status_code == 200 else reply.json()["error"]["code"], seconds)

    async def capacity(self) -> float:
        """Images a second of a device that always has work."""
        dice, begin, done = random.Random(0), time.perf_counter() + FILL, 0

        async def client() -> None:
            nonlocal done
            while time.perf_counter() - begin < SAMPLE:
                answer = await self.ask("flood", body(dice))
                done += answer.status == "200" and 0 <= time.perf_counter() - begin < SAMPLE

        await asyncio.gather(*(client() for _ in range(16)))
        return done / SAMPLE

    async def flood(self, rate: float, seconds: float) -> list[Answer]:
        """Arrivals at `rate` a second, by a clock that does not wait for answers."""
        dice, tasks, due = random.Random(1), [], 0.0
        start = time.perf_counter()
        while (due := due + dice.expovariate(rate)) < seconds:
            client = "flood" if dice.random() < FLOOD else dice.choice(CLIENTS[1:])
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(client, body(dice))))
        return await asyncio.gather(*tasks)

    async def rest(self) -> None:
        """Until the server has nothing left to do."""
        while (await self.http.get("/healthz")).json()["queue_device_seconds"] > 0:
            await asyncio.sleep(0.2)


def key_of(client: str) -> str:
    return f"sk-bench-{client}-0123456789"


def summary(answers: list[Answer], patience: float) -> dict[str, Any]:
    """What became of them. others: the part of the small clients' requests that was answered in time."""
    good = [answer for answer in answers if answer.status == "200" and answer.seconds <= patience]
    others = [answer for answer in answers if answer.client != "flood"]
    seconds = sorted(answer.seconds for answer in good)
    return {
        "sent": len(answers),
        "in_time": len(good),
        "late": sum(answer.status == "200" for answer in answers) - len(good),
        "others": round(sum(answer in good for answer in others) / max(1, len(others)), 3),
        "p50": round(statistics.median(seconds), 2) if seconds else None,
        "p95": round(seconds[int(0.95 * len(seconds))], 2) if seconds else None,
        "refused": dict(Counter(answer.status for answer in answers if answer.status != "200")),
    }


async def measure(url: str, named: bool, rate: float | None, options: argparse.Namespace) -> tuple[float, list[Any]]:
    """(capacity, a summary for each factor) of one server."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    patience, found = options.patience, []
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=HOLD * patience) as http:
        crowd = Crowd(http, named, patience)
        await crowd.ask("flood", body(random.Random(0)))
        rate = rate or await Crowd(http, named, 600.0).capacity()
        for factor in FACTORS:
            await crowd.rest()
            found.append(summary(await crowd.flood(factor * rate, options.seconds), patience))
    return rate, found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals in each of the four runs")
    parser.add_argument("--patience", type=float, default=8.0, help="seconds after which an image is of no use")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        keys.write_text("".join(f'[keys.{name}]\nkey = "{key_of(name)}"\n' for name in CLIENTS), encoding="utf-8")
        with serving(options.patience, keys) as url:
            rate, fair = asyncio.run(measure(url, True, None, options))
        with serving(1e9, None) as url:
            _, endless = asyncio.run(measure(url, False, rate, options))
    show(rate, {"fair": fair, "endless": endless}, options)


def show(rate: float, servers: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """The table, and the same in one JSON line."""
    print(f"capacity {rate:.1f} images/s, patience {options.patience:.0f} s, {options.seconds:.0f} s of arrivals")
    print(f"{'load':6}{'queue':10}{'sent':>6}{'in time':>9}{'late':>6}{'others':>8}{'p50 s':>7}{'p95 s':>7}  refused")
    runs = []
    for place, factor in enumerate(FACTORS):
        for name, found in servers.items():
            row = found[place]
            cells = f"{row['sent']:6}{row['in_time']:9}{row['late']:6}{row['others']:8.0%}"
            print(f"{factor:>4}x {name:10}{cells}{row['p50'] or 0:7}{row['p95'] or 0:7}  {row['refused']}")
            runs.append({"load": factor, "queue": name, **row})
    facts = {"bench": "overload", "date": str(date.today()), "machine": platform.processor() or platform.machine()}
    print(json.dumps({**facts, "capacity": round(rate, 2), "patience": options.patience, "runs": runs}))


if __name__ == "__main__":
    main()
