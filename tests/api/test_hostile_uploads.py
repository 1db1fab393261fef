"""200 hostile uploads: one clear error each, memory stays flat, nothing is left behind, and nobody else waits."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.parts.cards import write_cards
from tests.parts.servers import Process
from tests.test_service import resident
from tests.test_source import BROKEN, CODED, IMAGE, REFUSED, bare_png, form, saved

EDITS = "/v1/images/edits"
FORM, JSON = "multipart/form-data; boundary=b", "application/json"
MEGABYTE = 1024 * 1024
COUNT, CLIENTS, PERIOD = 200, 6, 0.04
"""Uploads, how many are sent at once, and seconds between two questions of the one who waits."""

P99 = 4.0
"""Seconds, a guard. It is 0.07 to 0.4 on two cores that others use too. `tests.bench.loop` measures it."""

SHARE = 0.05
"""The most of the time of one large upload that others wait in the median: it is about 0.005, and 0.5 where uploads are
read on the event loop."""

CODE = """
import sys
from functools import partial
from app import main
from app.api.front import Front
from app.settings import Settings

async def in_process(self, work, *arguments):
    return work(*arguments)

if sys.argv[2] == "on the event loop":
    Front.in_process = in_process
main.Supervisor = partial(main.Supervisor, command=(sys.executable, "tests/parts/fake_worker.py"))
main.serve(Settings(models=sys.argv[1], devices="cpu", port=0, drain=0, default_model="tiny-text", preload="all"))
"""

MASK, PROMPT = 'name="mask"; filename="m"', ("name=prompt", b"a")  # without one, no picture is decoded
DARK = (MASK, saved(np.zeros((8192, 8192), np.uint8), compress_level=1))
LARGE = {
    "a mask of 64 megapixels": (FORM, form(IMAGE, DARK, PROMPT)),
    "a mask and a picture of 64 megapixels": (FORM, form((IMAGE[0], DARK[1]), DARK, PROMPT)),
    "64 megapixels that end early": (FORM, form((IMAGE[0], bare_png(8192, 8192, body=bytes(8192 * 3 * 4096))), PROMPT)),
    "8 MB of parts": (FORM, form(IMAGE) [:-7] + form(("name=a", b"")) * (8 * MEGABYTE // 55)),
    "8 MB of beginnings of a boundary": (FORM, form(IMAGE)[:-7] + b"\r\n-" * (8 * MEGABYTE // 3)),
    "24 MB of lists": (JSON, b'{"image":[' + b"[]," * (8 * MEGABYTE) + b"1]}"),
    "30 MB of no base64": (JSON, b'{"image":"' + b"a" * (30 * MEGABYTE) + b'*"}'),
    "33 MB": (FORM, form(IMAGE, (MASK, bytes(33 * MEGABYTE)))),
}  # fmt: skip
"""What costs the server most."""

SMALL = {
    **{f"a file: {name}": (FORM, form((IMAGE[0], data), PROMPT)) for name, data in BROKEN.items()},
    **{f"a mask: {name}": (FORM, form(IMAGE, (MASK, data or b" "), PROMPT)) for name, data in BROKEN.items()},
    **{f"a form: {name}": (FORM, body) for name, (body, _, _) in REFUSED.items()},
    "broken JSON": (JSON, b"{"),
    "JSON nested deep": (JSON, b"[" * 500_000),
    "not a number": (JSON, json.dumps({"image": CODED, "strength": float("nan")}).encode()),
    "no such field": (JSON, json.dumps({"image": CODED, "strenght": 1}).encode()),
}  # fmt: skip


WAITER = """
import http.client, sys, threading, time

over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set())).start()
wire, period = http.client.HTTPConnection(sys.argv[1], timeout=120), float(sys.argv[2])
begun, count = time.monotonic(), 0
while not over.is_set():
    due = begun + count * period
    time.sleep(max(0.0, due - time.monotonic()))
    wire.request("GET", "/health")
    assert wire.getresponse().read()
    print(time.monotonic() - due)
    count += 1
"""
"""Asks `/health` every so many seconds, and prints how long after it was due each answer came. It is a process of its
own: the senders hold the interpreter of theirs."""


@contextmanager
def waiting(server: Process) -> Iterator[list[float]]:
    """The seconds are there when the context is left."""
    words = (sys.executable, "-c", WAITER, server.url.removeprefix("http://"), str(PERIOD))
    found: list[float] = []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as waiter:
        try:
            yield found
        finally:
            found += map(float, waiter.communicate()[0].split())


def p99(waits: list[float]) -> float:
    return statistics.quantiles(waits, n=100)[98]


@contextmanager
def serving(folder: Path, how: str = "") -> Iterator[Process]:
    (folder / "uploads").mkdir()
    words = (sys.executable, "-c", CODE, str(write_cards(folder / "models")), how)
    with Process(words, TMPDIR=str(folder / "uploads")) as server:
        server.wait_ready()
        yield server


def sent(server: Process, kind: str, body: bytes) -> httpx.Response:
    with httpx.Client(timeout=120, verify=False) as client:  # certificates would take this process's time
        return client.post(f"{server.url}{EDITS}", content=body, headers={"Content-Type": kind})


@pytest.mark.slow
def test_200_hostile_uploads_cost_an_error_each_and_nothing_else(tmp_path: Path) -> None:
    uploads = [*LARGE.items(), *islice(cycle(SMALL.items()), COUNT - len(LARGE))]
    with serving(tmp_path) as server:
        for kind, body in islice(SMALL.values(), 40):
            sent(server, kind, body)
        before = resident(server.process.pid)
        with waiting(server) as waits, ThreadPoolExecutor(CLIENTS) as pool:
            replies = list(pool.map(lambda upload: (upload[0], sent(server, *upload[1])), uploads))
        statuses = Counter(reply.status_code for _, reply in replies)
        assert set(statuses) == {400, 413} and statuses.total() == COUNT, statuses
        for name, reply in replies:
            error = reply.json()["error"]
            assert error["code"] != "internal_error" and 10 < len(error["message"]) < 200, (name, error)
            assert not name.startswith(("a file", "a mask", "64")) or error["param"] in ("image", "mask"), (name, error)
        print(f"p99 {p99(waits):.3f} s, memory {(resident(server.process.pid) - before) / 1e6:.1f} MB, {statuses}")
        assert resident(server.process.pid) - before < 100e6
        assert p99(waits) < P99
        assert not list((tmp_path / "uploads").iterdir())
        assert sent(server, FORM, form(IMAGE, PROMPT)).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "on the event loop"])
def test_nobody_waits_while_a_large_upload_is_read(tmp_path: Path, how: str) -> None:
    """With a control: the same where it is read on the event loop."""
    with serving(tmp_path, how) as server:
        sent(server, FORM, form(IMAGE, PROMPT))
        with waiting(server) as waits:
            start = time.monotonic()
            sent(server, *LARGE["a mask and a picture of 64 megapixels"])
            took = time.monotonic() - start
        share = statistics.median(waits) / took
        print(f"{took:.2f} s, in which others waited {share:.4f} of that")
        assert (share > SHARE) == bool(how)
