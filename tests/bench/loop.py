"""How long `/health` waits while other clients ask for what is dear.

    python -m tests.bench.loop [--tree PATH] [CASE ...]

A real server with the cards of `models/` and a worker that draws nothing; one process asks `/health` 25 times a
second on a connection of its own, another loads the server. A request that was due while the one before it waited
counts from when it was due. --tree: serve the code of another checkout. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from tests.parts.servers import Process

ROOT = Path(__file__).parents[2]
SECONDS, PERIOD, LAST = 8.0, 0.04, 60.0
"""How long a case lasts, how often `/health` is asked, and how long its last answer is waited for."""
BATCH = 20
"""Requests that a connection sends at once."""

CODE = """
import sys
from functools import partial
from app import main
from app.settings import Settings
main.Supervisor = partial(main.Supervisor, command=(sys.executable, "tests/parts/fake_worker.py"))
main.serve(Settings(models=sys.argv[1], devices="cpu", port=0, drain=0, max_wait=1e9, connections_per_address=0))
"""
MEGABYTE = 1024 * 1024
FORM, PART = "multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\n"


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: a", *headers, "", "")).encode()


def post(body: bytes, path: str = "/v1/images/generations", *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: a", "Accept: image/png", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


def chunked(body: bytes) -> bytes:
    """The body a byte a chunk."""
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


def upload(kind: str, body: bytes) -> bytes:
    return post(body, "/v1/images/edits", f"Content-Type: {kind}")


def picture(width: int, height: int) -> bytes:
    """A form with a black PNG of this size, of which the lower half is missing."""
    head, lines = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), bytes((3 * width + 1) * height // 2)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    written = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    file = b"\x89PNG\r\n\x1a\n" + b"".join(written)
    asked = PART.replace(b"name=a", b"name=prompt") + b"a\r\n"  # without a prompt the picture would not be decoded
    return asked + PART.replace(b"name=a", b"name=image; filename=a") + file + b"\r\n--b--\r\n"


def filled(start: str, unit: str, end: str) -> bytes:
    """JSON of nearly a megabyte: the unit as often as it fits."""
    return f"{start}{unit * ((MEGABYTE - len(start) - len(end)) // len(unit))}{end}".encode()


def fields(count: int, inside: str = "{}") -> bytes:
    return inside.replace("{}", "{" + ",".join(f'"field_{number}":0' for number in range(count)) + "}").encode()


def asked(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@dataclass(frozen=True)
class Case:
    """What so many connections send, again and again, without waiting for answers."""

    connections: int
    request: bytes


MISSPELT = ["goldn retreiver"] * 10
CASES = {
    "nothing": Case(0, b""),
    "/openapi.json": Case(100, get("/openapi.json")),
    "/docs/swagger-ui-bundle.js": Case(100, get("/docs/swagger-ui-bundle.js")),
    "/v1/models": Case(100, get("/v1/models")),
    "/v1/models/emoji-mmdit": Case(100, get("/v1/models/emoji-mmdit")),
    "/v1/models/dit-xl-2-256/classes": Case(100, get("/v1/models/dit-xl-2-256/classes")),
    "/metrics": Case(100, get("/metrics")),
    "no such model": Case(100, get("/v1/models/" + "emoji-mmdti" * 2000)),
    "a 1 MB prompt": Case(8, post(filled('{"prompt":"', "a", '"}'))),
    "a 1 MB negative prompt": Case(8, post(filled('{"prompt":"a","negative_prompt":"', "a", '"}'))),
    "a 1 MB model name": Case(8, post(filled('{"prompt":"a","model":"', "a", '"}'))),
    "a 1 MB sampler": Case(8, post(filled('{"prompt":"a","sampler":"', "a", '"}'))),
    "a 1 MB field that is ignored": Case(8, post(filled('{"prompt":"a","user":"', "a", '","n":0}'))),
    "a misspelt class": Case(8, post(asked(model="dit-xl-2-256", class_label="goldn retreiver"))),
    "a long misspelt class": Case(8, post(asked(model="dit-xl-2-256", class_label="goldn retreiver " * 4))),
    "comparison of misspelt classes": Case(
        8, post(asked(models=["dit-xl-2-256", "dit-xl-2-512"], class_label=MISSPELT), "/v1/images/compare")
    ),
    "an unknown field": Case(8, post(asked(prompt="a", numb_of_inferrence_stepps=1))),
    "a list of 500,000 classes": Case(8, post(filled('{"model":"dit-xl-2-256","class_label":[', "1,", "1]}"))),
    "a comparison of 1 MB": Case(8, post(filled('{"prompt":"a","models":[', '"a",', '"a"]}'), "/v1/images/compare")),
    "300,000 lists": Case(8, post(filled('{"prompt":[', "[],", "[]]}"))),
    "60,000 unknown fields": Case(8, post(fields(60_000))),
    "60,000 unknown fields of grid": Case(8, post(fields(60_000, '{"prompt":"a","grid":{}}'))),
    "JSON nested 500,000 deep": Case(8, post(b"[" * 500_000)),
    "brackets and digits in a prompt": Case(4, post(asked(model="sd3.5-medium", prompt="[a:" + "1" * 9000))),
    "32 kB of Accept": Case(8, post(asked(prompt="a", n=0), "/v1/images/generations", "Accept: " + "a," * 15_000)),
    "a form of 2 MB of parts": Case(4, upload(FORM, (PART + b"\r\n") * (2 * MEGABYTE // len(PART)))),
    "3 MB of JSON lists": Case(4, upload("application/json", b'{"image":[' + b"[]," * MEGABYTE + b"1]}")),
    "16 megapixels that end early": Case(8, upload(FORM, picture(4096, 4096))),
    "one byte a chunk": Case(8, chunked(b'{"prompt":"' + b"a" * 30_000 + b'"}')),
}  # fmt: skip


@contextmanager
def serving(tree: Path) -> Iterator[str]:
    """The host and port of a server with the code of this tree."""
    with Process((sys.executable, "-c", CODE, str(ROOT / "models")), cwd=tree, **os.environ) as server:
        yield str(server.logged("listening")["address"])


def probe(address: str, ready: Barrier, told: Queue[list[float]]) -> None:
    """Ask `/health` every PERIOD for SECONDS. Puts the seconds that each answer came after its request was due."""
    connection, found = http.client.HTTPConnection(address, timeout=LAST), []
    ready.wait()
    begun = time.time()
    with suppress(OSError, http.client.HTTPException):
        for number in range(int(SECONDS / PERIOD)):
            due = begun + number * PERIOD
            time.sleep(max(0.0, due - time.time()))
            connection.request("GET", "/health")
            connection.getresponse().read()
            found.append(time.time() - due)
    told.put(found or [LAST])


def load(address: str, case: Case, ready: Barrier, answers: Queue[int]) -> None:
    """Send what the case says until the time is over. Puts how many answers came."""
    host, _, port = address.partition(":")
    count = 0

    async def client() -> None:
        nonlocal count
        reader, writer = await asyncio.open_connection(host, int(port))
        batch = case.request * (BATCH if len(case.request) < 65536 else 1)

        async def send() -> None:
            while True:
                writer.write(batch)
                await writer.drain()

        sender = asyncio.ensure_future(send())
        with suppress(OSError):
            while data := await reader.read(MEGABYTE):
                count += data.count(b"HTTP/1.1 ")
        sender.cancel()

    async def crowd() -> None:
        ready.wait()
        begun = time.time()
        clients = [asyncio.ensure_future(client()) for _ in range(case.connections)]
        await asyncio.sleep(max(0.0, begun + SECONDS - time.time()))
        for one in clients:
            one.cancel()

    asyncio.run(crowd())
    answers.put(count)


def measure(address: str, case: Case) -> dict[str, float]:
    """p50, p99 and maximum of `/health` in milliseconds, and the answers that the others had in all."""
    context = multiprocessing.get_context("spawn")
    told: Queue[list[float]] = context.Queue()
    answers: Queue[int] = context.Queue()
    ready = context.Barrier(2)  # both processes have started
    both = (
        context.Process(target=load, args=(address, case, ready, answers)),
        context.Process(target=probe, args=(address, ready, told)),
    )
    for process in both:
        process.start()
    waits, count = told.get(timeout=3 * LAST), answers.get(timeout=3 * LAST)
    for process in both:
        process.join(10)
    cuts = statistics.quantiles(waits, n=100) if len(waits) > 1 else waits * 99
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98], "max": 1e3 * max(waits), "answers": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="parts of the names of cases; all of them without")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        if args.cases and not any(word in name for word in args.cases):
            continue
        with serving(args.tree) as address:  # a server for each: what one left behind is not the next one's
            found[name] = {key: round(value, 1) for key, value in measure(address, case).items()}
        one = found[name]
        print(
            f"{name:34} p50 {one['p50']:8.1f}  p99 {one['p99']:8.1f}  max {one['max']:8.1f} ms  {one['answers']:6.0f}"
        )
    print(json.dumps({"bench": "loop", "date": str(date.today()), "cases": found}))


if __name__ == "__main__":
    main()
