"""What serving adds: one request after the other through HTTP, against the same work in this process.

    python -m tests.bench.serve [--rounds 12] [--model emoji-mmdit]

Both engines are alive the whole time and take turns in the order A B B A. Ends in one JSON line. The bar: the served
time less the encoding of its PNG is at most 3 % or 5 ms over the time in the process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import IO

import httpx

from app.cards.card import Card, read_cards
from app.jobs.body import read_body
from app.jobs.job import Job
from app.settings import Settings
from app.worker.local import Local

BODY = {"prompt": "a red apple on a blue background", "seed": 7}


def start(models: Path, log: IO[bytes]) -> tuple[subprocess.Popen[bytes], str]:
    """A real server on a free port, once it is ready. log: a file, for what it says."""
    instep = Path(sys.executable).with_name("instep")
    command = [str(instep), "serve", "--port", "0", "--preload", "all", "--models", str(models)]
    process = subprocess.Popen(command, stderr=log)
    url = ""
    while not url:
        assert process.poll() is None, "the server ended before it listened"
        found = re.search(rb"http://[\d.:]+", os.pread(log.fileno(), 1 << 16, 0))
        url = found[0].decode() if found else ""
        time.sleep(0.1)
    while httpx.get(f"{url}/readyz").status_code != 200:
        time.sleep(0.2)
    return process, url


def served(client: httpx.Client, body: dict[str, object]) -> tuple[float, float]:
    """Seconds from request to reply, and those of them that encoded the PNG."""
    begin = time.perf_counter()
    reply = client.post("/v1/images/generations", json=body).raise_for_status().json()
    return time.perf_counter() - begin, reply["timings"]["image_encode"]


def inside(local: Local, card: Card, body: dict[str, object], number: int) -> float:
    """Seconds from request to pixels."""
    begin = time.perf_counter()
    read = read_body(body)
    local.submit(Job(read.to_request(card, f"inside-{number}"), card, read)).future.result(60)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", default="emoji-mmdit")
    args = parser.parse_args()
    models = Path("models")
    cards, body = read_cards(models), {**BODY, "model": args.model}
    log = tempfile.TemporaryFile()  # noqa: SIM115 - the server's, until it ends
    process, url = start(models, log)
    times: dict[str, list[float]] = {"served": [], "encode": [], "inside": []}
    try:
        with (
            Local(Settings(models=models), cards) as local,
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            for number in range(4 * args.rounds):
                if number % 4 in (0, 3):
                    total, encode = served(http, body)
                    times["served"].append(total)
                    times["encode"].append(encode)
                else:
                    times["inside"].append(inside(local, cards[args.model], body, number))
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
    medians = {name: round(1e3 * statistics.median(values[2:]), 2) for name, values in times.items()}
    added = round(medians["served"] - medians["encode"] - medians["inside"], 2)
    share = round(added / medians["inside"], 4)
    print(
        "   ".join(f"{name} {value:.1f} ms" for name, value in medians.items()),
        f"  serving adds {added} ms, {share:.1%}",
    )
    facts = {"bench": "overhead", "date": str(date.today()), **medians, "added_ms": added, "added_share": share}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
