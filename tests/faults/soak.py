"""Mixed traffic for an hour, and whether anything grows: `python -m tests.faults.soak --minutes 60`.

A real `instep serve` on a loopback port. Requests come at random times, far below capacity: three models, JSON, bytes,
streams with previews, comparisons, at the start of each minute many at once; one client in ten leaves. At the end of
the minute all is answered, and then the memory, the descriptors and the threads of the front and of the engine process
are read: one line. It ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import httpx

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.bench.growth import resident
from tests.parts.servers import ROOT, Served, free_port, wait_ready
from tests.parts.workers import faulty

MODELS = ("emoji-mmdit-turbo", "emoji-mmdit", "emoji-dit")
LEAVING = 0.1
CROWD = 12
"""Requests that come at once at the start of each minute, so that forwards have many widths."""

PATIENCE = 100.0
"""Seconds after which an answer counts as hanging."""

SLOPE = 1.0
"""MB by which a process may grow from one sample to the next, in the second half."""

MORE = 2
"""Descriptors or threads that a process may have more at the end than in its second quarter."""


@dataclass(frozen=True)
class Facts:
    """What one process has at rest."""

    megabytes: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Facts:
        folder = Path(f"/proc/{pid}")
        return cls(resident(pid), len(os.listdir(folder / "fd")), len(os.listdir(folder / "task")))


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    found = (task / "children" for task in Path(f"/proc/{pid}/task").iterdir())
    return [int(word) for file in found for word in file.read_text().split()]


def judge(samples: Sequence[Facts], most: float = SLOPE) -> dict[str, Any]:
    """The slope of the memory in the second half, what else grew since the second quarter, and "flat" or "leak".

    most: MB by which the memory may grow from one sample to the next.
    """
    half, quarter = len(samples) // 2, len(samples) // 4
    late, early, end = samples[half:], samples[quarter:half], samples[-quarter:]
    slope = linear_regression(range(len(late)), [one.megabytes for one in late]).slope
    more = {
        name: round(median(getattr(one, name) for one in end) - median(getattr(one, name) for one in early), 1)
        for name in ("descriptors", "threads")
    }
    grows = slope > most or max(more.values()) > MORE
    megabytes = round(samples[0].megabytes, 1), round(samples[-1].megabytes, 1)
    return {"slope_mb": round(slope, 3), "mb": megabytes, "more": more, "verdict": "leak" if grows else "flat"}


class Traffic:
    """Clients of one server, `rate` requests a second. leave: seconds within which a client that leaves does so."""

    def __init__(self, url: str, models: Sequence[str], rate: float, leave: float, seed: int = 0) -> None:
        self.url, self.models, self.rate, self.leave = url, models, rate, leave
        self.dice = random.Random(seed)
        self.outcomes: Counter[str] = Counter()

    async def minute(self, seconds: float) -> None:
        """Send requests for so long, and wait until all are answered and all connections are closed."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, limits=limits, timeout=None) as http:
            tasks = [asyncio.create_task(self._client(http)) for _ in range(CROWD)]
            start, due = time.monotonic(), 0.0
            while (due := due + self.dice.expovariate(self.rate)) < seconds:
                await asyncio.sleep(max(0.0, start + due - time.monotonic()))
                tasks.append(asyncio.create_task(self._client(http)))
            self.outcomes.update(await asyncio.gather(*tasks))
            while (await http.get("/healthz")).json()["queue_device_seconds"] > 0:
                await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)  # the front closes its ends, and the engine takes the last cancellations

    async def _client(self, http: httpx.AsyncClient) -> str:
        """ "answered", "left", "hung", or what else came."""
        route, body, accept = self._wanted()
        leaves = self.dice.random() < LEAVING
        try:
            async with asyncio.timeout(self.dice.uniform(0, self.leave) if leaves else PATIENCE):
                reply = await http.post(f"/v1/images/{route}", json=body, headers={"Accept": accept})
        except TimeoutError:
            return "left" if leaves else "hung"
        whole = not body.get("stream") or '"type":"image_generation.completed"' in reply.text
        return "answered" if reply.status_code == 200 and whole else f"{reply.status_code} {reply.text[:100]}"

    def _wanted(self) -> tuple[str, dict[str, Any], str]:
        """Route, body and Accept of the next request."""
        dice = self.dice
        model, steps = dice.choice(self.models), dice.choice((2, 4, 8, 12))
        body: dict[str, Any] = {"num_inference_steps": steps, "seed": dice.randrange(1 << 30)}
        prompt = f"{dice.choice(('red', 'green', 'blue'))} apple {dice.randrange(1000)}"
        accept = dice.choice(("application/json", "image/png", "image/jpeg"))
        if dice.random() < 0.1:
            texts = [name for name in self.models if not name.endswith("-dit")]
            return "compare", body | {"models": texts, "prompt": [prompt]}, accept
        body |= {"class_label": dice.randrange(10)} if model.endswith("-dit") else {"prompt": prompt}
        body |= {"model": model, "guidance_scale": dice.choice((0, 4.0))}
        if dice.random() < 0.3:
            return "generations", body | {"stream": True, "partial_images": 2}, "application/json"
        return "generations", body | ({"n": 2} if accept == "application/json" else {}), accept


def soak(front: int, traffic: Traffic, minutes: int, seconds: float, most: float = SLOPE) -> dict[str, Any]:
    """So many samples, `seconds` of traffic before each. What grew in the front and in the engine process.

    front: the process id of the server, which is ready.
    """
    (engine,) = children(front)
    asyncio.run(traffic.minute(seconds))  # what every process sets up once
    samples: dict[str, list[Facts]] = {"front": [], "engine": []}
    for minute in range(1, minutes + 1):
        asyncio.run(traffic.minute(seconds))
        for name, pid in (("front", front), ("engine", engine)):
            samples[name].append(Facts.of(pid))
        print(f"minute {minute:3}", *(f"{name} {rows[-1]}" for name, rows in samples.items()), dict(traffic.outcomes),
              sep="   ", flush=True)  # fmt: skip
    found: dict[str, Any] = {name: judge(rows, most) for name, rows in samples.items()}
    return {"samples": minutes, "outcomes": dict(traffic.outcomes), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--leak", action="store_true", help="with half a megabyte of every image kept, to see it found")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        port = free_port()
        facts = Settings(models=ROOT / "models", devices="cpu", port=port, preload=",".join(MODELS), cache=Path(cache))
        with Served(facts, faulty("leak") if options.leak else WORKER) as server:
            traffic = Traffic(f"http://127.0.0.1:{port}", MODELS, options.rate, leave=1.0)
            wait_ready(traffic.url, 900.0, lambda: server.process.poll() is None)
            found = soak(server.process.pid, traffic, options.minutes, 60.0)
            server.stop()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"bench": "soak", "date": str(date.today()), "machine": machine, "rate": options.rate, **found}))


if __name__ == "__main__":
    main()
