"""A server under load over loopback HTTP: each request alone, all at once for its capacity, and a trace for latency."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
from typing import Any, NamedTuple

import httpx
import numpy as np

from app.bench.traffic import Arrival, Mix, arrivals, kinds
from app.cards.card import Card
from app.errors import EngineError, InvalidValue
from app.settings import Settings

PATH = "/v1/images/generations"
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


def measure(
    settings: Settings, card: Card, mix: Mix, seed: int, plan: tuple[float, int, float, int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Start a server with these settings, load it, and return capacity and latencies as plain data.

    plan: the share of its capacity at which requests arrive, requests of the closed loop, seconds of arrivals, rounds
    of both. say: is called with each line of progress. Raises InvalidValue: there is no request in that time;
    EngineError: the server does not get ready, or does not answer a request that it gets alone.
    """
    share, queued, seconds, rounds = plan
    say("starting")
    with serving(settings, card.id) as url:
        load = Load("instep", url, kinds(card, mix))
        for _ in range(SAMPLES):
            load.time_alone()
        for _ in range(rounds):
            say(f"{queued} queued, {load.fill(islice(arrivals(card, mix, 1.0, seed), queued)):.2f} images/s")
        rate = share * statistics.median(load.rates)
        replayed = [*takewhile(lambda one: one.at < seconds, arrivals(card, mix, rate, seed))]
        if not replayed:
            raise InvalidValue(f"seconds: there is no request in {seconds:g} s", param="seconds")
        for _ in range(rounds):
            say(f"{len(replayed)} requests in {seconds:g} s")
            load.replay(replayed)
        facts = {"trace": {"name": mix, "seed": seed}, "load": share, "rate": rate, "queued": queued}
        times = {"seconds": seconds, "rounds": rounds, "requests": len(replayed)}
        return {**facts, **times, **load.facts(load.alone)}


class Answer(NamedTuple):
    """The end of one request.

    late: seconds that the client sent it late. seconds: from the time of the arrival to the last byte. status: 200 for
    a whole picture.
    """

    arrival: Arrival
    late: float
    seconds: float
    status: int


class Load:
    """One server under load, and its answers: `time_alone`, then `fill`, then `replay`, each as often as wanted."""

    def __init__(self, name: str, url: str, kinds: Sequence[Arrival]) -> None:
        """Warm up with a request of every kind of work. Raises EngineError when the server does not answer one."""
        self.name, self.url, self.kinds = name, url, kinds
        self.times: dict[str, list[float]] = {arrival.work: [] for arrival in kinds}
        self.rates: list[float] = []
        self.filled: list[Answer] = []
        self.replayed: list[Answer] = []
        with _client(url) as http:
            for arrival in kinds:
                reply = http.post(PATH, json=arrival.body, timeout=None)
                if reply.status_code != 200:
                    raise EngineError(f"{name}: {reply.status_code} for {arrival.work}: {reply.text[:300]}")
        self._before = self._forwards()

    def time_alone(self) -> None:
        """Time one request of each kind of work on the idle server."""
        for arrival in self.kinds:
            (answer,) = asyncio.run(open_loop(self.url, [arrival._replace(at=0.0)]))
            self.times[arrival.work].append(answer.seconds)
        self._before = self._forwards()

    def fill(self, arrivals: Iterable[Arrival]) -> float:
        """Send all of them at once, and return pictures a second until the last. Raises EngineError: none came."""
        answers = asyncio.run(open_loop(self.url, [arrival._replace(at=0.0) for arrival in arrivals]))
        done = sum(answer.status == 200 for answer in answers)
        if not done:
            raise EngineError(f"{self.name}: none of {len(answers)} requests was answered: {_statuses(answers)}")
        self.rates.append(done / max(answer.seconds for answer in answers))
        self.filled += answers
        return self.rates[-1]

    def replay(self, arrivals: Sequence[Arrival]) -> None:
        """Send each request at its time."""
        self.replayed += asyncio.run(open_loop(self.url, arrivals))

    @property
    def alone(self) -> dict[str, float]:
        """Median seconds alone of each kind of work."""
        return {work: statistics.median(times) for work, times in self.times.items()}

    def facts(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """All measurements as plain data. limits: seconds alone of each kind of work, by which deadlines are set."""
        by_class: dict[str, list[float]] = {}
        for arrival in self.kinds:
            by_class.setdefault(arrival.kind, []).append(self.alone[arrival.work])
        forwards, rows = self._forwards() - self._before
        median, least, most = statistics.median(self.rates), min(self.rates), max(self.rates)
        return {
            "capacity": {"median": median, "least": least, "most": most, "samples": len(self.rates)},
            "alone": {kind: statistics.fmean(values) for kind, values in by_class.items()},
            "rows": rows / forwards if forwards else None,
            "statuses": _statuses([*self.filled, *self.replayed]),
            "latency": latencies(self.replayed, limits),
            "client_late": max(one.late for one in self.replayed),
        }

    def _forwards(self) -> np.ndarray:
        """[denoising forwards so far, rows in them], from the server's own metrics."""
        with _client(self.url) as http:
            text = http.get("/metrics").text
        found = re.findall(r"^instep_batch_rows_(count|sum){.*} (\S+)$", text, re.MULTILINE)
        return np.array([sum(float(value) for name, value in found if name == what) for what in ("count", "sum")])


def latencies(answers: Sequence[Answer], limits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By class and for all: the number of requests; p50, p95, p99 and mean in seconds of the pictures that came; and
    the share of all requests whose picture came by its deadline.

    limits: seconds alone of each kind of work.
    """
    found = {}
    for kind in (ALL, *sorted({answer.arrival.kind for answer in answers})):
        own = [answer for answer in answers if kind in (ALL, answer.arrival.kind)]
        good = [answer for answer in own if answer.status == 200]
        seconds = [answer.seconds for answer in good] or [0.0]
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist()
        in_time = sum(answer.seconds <= DEADLINE * limits[answer.arrival.work] for answer in good)
        times = {"p50": p50, "p95": p95, "p99": p99, "mean": statistics.fmean(seconds)}
        found[kind] = {"count": len(own), **times, "attainment": in_time / max(1, len(own))}
    return found


def _statuses(answers: Sequence[Answer]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(Counter(one.status for one in answers).items())}


async def open_loop(url: str, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Send each request at its time, whether others are answered or not; the answers are in order of the arrivals."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False, verify=False) as client:
        start = time.perf_counter()

        async def one(arrival: Arrival) -> Answer:
            late = time.perf_counter() - start - arrival.at
            status = await _ask(client, arrival)
            return Answer(arrival, late, time.perf_counter() - start - arrival.at, status)

        async with asyncio.TaskGroup() as group:
            tasks = []
            for arrival in arrivals:
                await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
                tasks.append(group.create_task(one(arrival)))
        return [task.result() for task in tasks]


async def _ask(client: httpx.AsyncClient, arrival: Arrival) -> int:
    """Ask for one picture and return the status."""
    try:
        reply = await client.post(PATH, json=arrival.body, headers={"Accept": "image/png"})
    except httpx.TransportError:
        return LOST
    return LOST if reply.status_code == 200 and not reply.content.startswith(PNG) else reply.status_code


def for_load(settings: Settings, model: str) -> Settings:
    """The settings of a server that refuses nothing and encodes every prompt, as a trace repeats and users do not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    changes: dict[str, Any] = {"host": "127.0.0.1", "port": port, "preload": model, "max_wait": ENDLESS, "drain": 0.0}
    changes |= {"max_connections": 0, "connections_per_address": 0, "log_level": "info", "text_cache": "0"}
    return settings.without_secrets().model_copy(update={**changes, "api_keys_file": ""})


@contextmanager
def serving(settings: Settings, model: str) -> Iterator[str]:
    """Start a server of these settings and wait until the model is loaded; its URL.

    Raises EngineError with the end of the server's log: it does not get ready.
    """
    settings = for_load(settings, model)
    command = (sys.executable, "-c", _SERVE, settings.model_dump_json())
    with (
        tempfile.TemporaryFile() as log,  # not a pipe: nobody reads it while the server writes
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log) as server,
    ):
        try:
            url = f"http://127.0.0.1:{settings.port}"
            if not _gets_ready(url, server, model):
                log.seek(0)
                raise EngineError(f"the server did not get ready: {log.read()[-1000:].decode(errors='replace')}")
            yield url
        finally:
            server.terminate()


def _gets_ready(url: str, server: subprocess.Popen[bytes], model: str) -> bool:
    """Wait for the model; False when it fails, the server ends or START seconds have passed."""
    until = time.monotonic() + START
    with _client(url) as http:
        while time.monotonic() < until and server.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if http.get("/readyz").status_code == 200:
                    return True
                if '"failed"' in http.get(f"/v1/models/{model}").text:
                    return False
            time.sleep(0.1)
    return False


def _client(url: str) -> httpx.Client:
    """A client of a server of our own, whatever proxy the environment names."""
    return httpx.Client(base_url=url, trust_env=False, timeout=10)
