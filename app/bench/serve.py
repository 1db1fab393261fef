"""A server under load over loopback HTTP: each request alone, all at once for its capacity, and a trace for latency.

The requests are of several kinds of work, at random times, and the same for the same seed.
"""

import asyncio
import contextlib
import json
import random
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
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np

from app.cards.card import Card
from app.errors import EngineError, InvalidValue
from app.samplers.table import compile_table, valid_samplers
from app.settings import Settings

Mix = Literal["mixed", "homogeneous"]

KINDS: Mapping[Mix, Sequence[tuple[int, bool, int]]] = {
    "mixed": (
        (4, False, 0), (6, False, 2), (8, False, 0), (12, False, 1), (20, False, 0), (28, False, 2), (50, False, 0),
        (4, True, 0), (8, True, 2), (14, True, 1), (20, True, 0), (28, True, 0), (50, True, 2),
    ),
    "homogeneous": ((20, True, 0),),
}  # fmt: skip
"""(steps, guided, index of one of the model's samplers), all equally likely."""

SAMPLERS = {
    "dit": ("ddim", "ddpm", "dpmpp_2m"),  # DiTPipeline does not scale its first noise, as the others need
    "sd3": ("flow_euler", "flow_heun", "flow_dpmpp_2m"),
    "flux": ("flow_euler", "flow_dpmpp_2m"),  # FluxPipeline gives sigmas, which the Heun does not take
    "unet": ("ddim", "euler", "euler_ancestral", "dpmpp_2m"),
}
"""What is drawn of each family: the samplers that diffusers' pipelines have too, so that they can be compared."""

CLASSES = {"short": 8, "medium": 40, "long": 10_000}
"""Most passes of each class; a guided line is two."""

PROMPTS = (
    "a red apple on a blue background", "a yellow star", "a green tree", "an orange cat", "a purple umbrella",
    "a slice of pizza", "a red car", "a brown dog", "a pink flower", "a white snowman", "a blue heart", "the sun",
)  # fmt: skip

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


class Arrival(NamedTuple):
    """One request. at: seconds from the start. kind: its class by length. body: of POST /v1/images/generations."""

    at: float
    kind: str
    body: dict[str, Any]

    @property
    def work(self) -> str:
        """A name for the work of the request: requests that differ only in what they show have the same name."""
        shown = ("prompt", "negative_prompt", "class_label", "seed")
        return json.dumps({name: value for name, value in sorted(self.body.items()) if name not in shown})


def arrivals(card: Card, mix: Mix, rate: float, seed: int) -> Iterator[Arrival]:
    """Draw requests for one model without end, the same for the same seed.

    They arrive as a Poisson process. rate: mean requests a second.
    """
    dice = random.Random(seed)
    at = 0.0
    while True:
        at += dice.expovariate(rate)
        yield Arrival(round(at, 6), *_draw(card, dice.choice(KINDS[mix]), dice))


def kinds(card: Card, mix: Mix) -> list[Arrival]:
    """One request of every kind of work."""
    return [Arrival(0.0, *_draw(card, kind, random.Random(0))) for kind in KINDS[mix]]


def _draw(card: Card, kind: tuple[int, bool, int], dice: random.Random) -> tuple[str, dict[str, Any]]:
    """The class and the body of one request."""
    samplers = [name for name in valid_samplers(card.schedule) if name in SAMPLERS[card.family]]
    steps, guided, which = kind
    steps = min(steps, card.limits.num_inference_steps)
    first = samplers.index(card.defaults.sampler) if card.defaults.sampler in samplers else 0
    sampler = samplers[(first + which) % len(samplers)]
    lines = compile_table(card.schedule, sampler, steps, tokens=1).lines
    passes = lines * (2 if guided and card.guidance == "cfg" else 1)
    shown: dict[str, Any] = {"prompt": dice.choice(PROMPTS)}
    if card.draws_classes:
        shown = {"class_label": dice.randrange(len(card.labels))}
    body = {
        "model": card.id, **shown, "sampler": sampler, "num_inference_steps": steps,
        "guidance_scale": min(4.0, card.limits.guidance_scale) if guided else 0.0, "seed": dice.randrange(2**31),
    }  # fmt: skip
    return next(kind for kind, most in CLASSES.items() if passes <= most), body


class Answer(NamedTuple):
    """The end of one request.

    late: seconds that the client sent it late. seconds: from its arrival to the last byte. status: 200 if it is whole.
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
