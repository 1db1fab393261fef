"""A server under load over loopback HTTP: each request alone, all at once for its capacity, and a trace for latency."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np

from app.bench.machine import spread
from app.bench.trace import Arrival, Trace
from app.errors import EngineError
from app.settings import Settings

Address = tuple[str, int]
PNG = b"\x89PNG\r\n\x1a\n"
LOST = 0
"""The status of a request whose connection broke, or whose answer was cut or was no picture."""

SAMPLES = 3
"""Requests of each kind of work that are timed alone, after one that warms up."""

DEADLINE = 3.0
"""Deadlines in multiples of a request's own service time alone, as in vLLM-Omni's diffusion_benchmark_serving.py."""

START = 1800.0
"""Seconds that a model may take to load and to be measured."""

ENDLESS = 1e12
"""Seconds of queue: nothing is refused, because what is measured is the time that all of it takes."""

ALL = "all"
"""The name of all classes together."""

_SERVE = """
import sys
from app import main
from app.settings import Settings
main.serve(Settings.model_validate_json(sys.argv[1]))
"""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""To a server of our own, whatever proxy the environment names."""


def measure(
    settings: Settings, model: str, trace: Trace, plan: tuple[float, int, float, int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Start a server with these settings, load it, and return capacity and latencies as plain data.

    plan: the share of its capacity at which the trace is replayed, requests of the closed loop, seconds of a replay,
    rounds of both. say: hears what is going on. Raises InvalidValue, and EngineError: the server does not get ready or
    does not answer a request that it gets alone.
    """
    share, queued, seconds, rounds = plan
    say("starting")
    with serving(settings, model) as address:
        load = Load("instep", address, trace)
        for _ in range(SAMPLES):
            load.time_alone()
        for _ in range(rounds):
            say(f"{queued} queued, {load.fill(queued):.2f} images/s")
        rate = share * statistics.median(load.rates)
        arrivals = trace.at_rate(rate, seconds)
        for _ in range(rounds):
            say(f"{len(arrivals)} requests in {seconds:g} s")
            load.replay(arrivals)
        facts = {"trace": trace.facts, "load": share, "rate": rate, "queued": queued, "seconds": seconds}
        return {**facts, "rounds": rounds, "requests": len(arrivals), **load.facts(load.alone)}


class Answer(NamedTuple):
    """What became of one request. late: seconds that the client sent it late; seconds: from its own time to its last
    byte, with these; status: 200 for a whole picture."""

    arrival: Arrival
    late: float
    seconds: float
    status: int


class Load:
    """One server under load, and what came of it: `alone`, then `fill`, then `replay`, each as often as wanted."""

    def __init__(self, name: str, address: Address, trace: Trace) -> None:
        """Warm up with every kind of work of the trace. Raises EngineError when the server does not answer one."""
        self.name, self.address, self.trace = name, address, trace
        self.times: dict[str, list[float]] = {work: [] for work in trace.kinds()}
        self.rates: list[float] = []
        self.filled: list[Answer] = []
        self.replayed: list[Answer] = []
        for arrival in trace.kinds().values():
            status, body = asyncio.run(ask(address, arrival))
            if status != 200:
                said = body[:300].decode(errors="replace")
                raise EngineError(f"{name}: the server answers {status} to {arrival.work}: {said}")
        self._before = self._forwards()

    def time_alone(self) -> None:
        """Time one request of each kind of work on the idle server."""
        for work, arrival in self.trace.kinds().items():
            (answer,) = asyncio.run(open_loop(self.address, [arrival._replace(at=0.0)]))
            self.times[work].append(answer.seconds)
        self._before = self._forwards()

    def fill(self, queued: int) -> float:
        """Ask for this many at once, and return pictures a second until the last. Raises EngineError: none came."""
        rate, answers = asyncio.run(closed_loop(self.address, self.trace.first(queued)))
        if not rate:
            raise EngineError(f"{self.name}: none of {queued} requests was answered: {_statuses(answers)}")
        self.rates.append(rate)
        self.filled += answers
        return rate

    def replay(self, arrivals: Sequence[Arrival]) -> None:
        """Send each request at its time."""
        self.replayed += asyncio.run(open_loop(self.address, arrivals))

    @property
    def alone(self) -> dict[str, float]:
        """Median seconds alone of each kind of work."""
        return {work: statistics.median(times) for work, times in self.times.items()}

    def facts(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """All of it as plain data. limits: seconds alone of each kind of work, by which deadlines are set."""
        by_class: dict[str, list[float]] = {}
        for work, arrival in self.trace.kinds().items():
            by_class.setdefault(arrival.kind, []).append(self.alone[work])
        forwards, rows = (after - before for before, after in zip(self._before, self._forwards(), strict=True))
        return {
            "capacity": spread(self.rates)._asdict(),
            "alone": {kind: statistics.fmean(values) for kind, values in by_class.items()},
            "rows": rows / forwards if forwards else None,
            "statuses": _statuses([*self.filled, *self.replayed]),
            "latency": latencies(self.replayed, limits),
            "client_late": max(one.late for one in self.replayed),
        }

    def _forwards(self) -> tuple[float, float]:
        """How many denoising forwards there were so far and the rows in them, by the server's own metrics."""
        text = _get(f"http://{self.address[0]}:{self.address[1]}/metrics")[1].decode()
        found = re.findall(r"^instep_batch_rows_(count|sum){.*} (\S+)$", text, re.MULTILINE)
        count, rows = (sum(float(value) for name, value in found if name == what) for what in ("count", "sum"))
        return count, rows


def latencies(answers: Sequence[Answer], limits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By class and in all: how many, p50, p95, p99 and mean in seconds of the pictures that came, and the share of all
    requests whose picture came by its deadline. limits: seconds alone of each kind of work."""
    found = {}
    for kind in (ALL, *sorted({answer.arrival.kind for answer in answers})):
        own = [answer for answer in answers if kind in (ALL, answer.arrival.kind)]
        good = [answer for answer in own if answer.status == 200]
        seconds = [answer.seconds for answer in good]
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist() if seconds else (0.0, 0.0, 0.0)
        in_time = sum(answer.seconds <= _deadline(answer.arrival, limits) for answer in good)
        mean = statistics.fmean(seconds) if seconds else 0.0
        share = in_time / len(own) if own else 0.0
        found[kind] = {"count": len(own), "p50": p50, "p95": p95, "p99": p99, "mean": mean, "attainment": share}
    return found


def _deadline(arrival: Arrival, limits: Mapping[str, float]) -> float:
    return DEADLINE * limits[arrival.work] if arrival.deadline is None else arrival.deadline


def _statuses(answers: Sequence[Answer]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(Counter(one.status for one in answers).items())}


async def open_loop(address: Address, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Send each request at its time, whatever became of the others; the answers are in order of the arrivals."""
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


async def ask(address: Address, arrival: Arrival) -> tuple[int, bytes]:
    """Send one request over its own connection, HTTP/1.1 by hand, and return status and body."""
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


def for_load(settings: Settings, model: str) -> Settings:
    """The settings of a server that refuses nothing and encodes every prompt, as a trace repeats and users do not."""
    changes: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "preload": model, "max_wait": ENDLESS, "drain": 0.0}
    changes |= {"max_connections": 0, "connections_per_address": 0, "log_level": "info", "text_cache": "0"}
    return settings.without_secrets().model_copy(update={**changes, "api_keys_file": ""})


@contextmanager
def serving(settings: Settings, model: str) -> Iterator[Address]:
    """Start a server of these settings and wait until the model is loaded. Raises EngineError with its last words."""
    command = (sys.executable, "-c", _SERVE, for_load(settings, model).model_dump_json())
    with tempfile.TemporaryFile() as log:  # not a pipe: nobody reads it while the server writes
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield _ready(server, log, model)
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _ready(server: subprocess.Popen[bytes], log: IO[bytes], model: str) -> Address:
    until, said = time.monotonic() + START, ""
    while time.monotonic() < until and server.poll() is None:
        said = os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")  # `seek` would move the server's place too
        found = re.search(r"http://(127\.0\.0\.1):(\d+)", said)
        if found and _get(f"{found[0]}/readyz")[0] == 200:
            return found[1], int(found[2])
        if found and b'"failed"' in _get(f"{found[0]}/v1/models/{model}")[1]:
            break
        time.sleep(0.1)
    raise EngineError(f"the server did not get ready: {said[-1000:]}")


def _get(url: str) -> tuple[int, bytes]:
    """Status and body; (0, b"") while nobody listens."""
    try:
        with _DIRECT.open(url, timeout=10) as reply:
            return int(reply.status), bytes(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, b""
    except OSError:
        return 0, b""
