"""What serving adds: one request after the other through HTTP, against the same work in this process.

    python -m tests.bench.serve [--rounds 12] [--model emoji-mmdit]

Both engines are alive the whole time and take turns in the order A B B A. Ends in one JSON line. The bar: the served
time less the encoding of its PNG is at most 3 % or 5 ms over the time in the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import httpx

from app.cards.card import Card
from app.cards.cards import read_cards
from app.jobs.body import read_body
from app.jobs.job import Job
from app.settings import Settings
from app.worker.process import Local
from tests.parts.servers import INSTEP, Process

BODY = {"prompt": "a red apple on a blue background", "seed": 7}


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
    times: dict[str, list[float]] = {"served": [], "encode": [], "inside": []}
    flags = ("--port", "0", "--preload", "all", "--models", str(models))
    with ExitStack() as stack:
        server = stack.enter_context(Process((*INSTEP, "serve", *flags), **os.environ))
        server.wait_ready()
        local = stack.enter_context(Local(Settings(models=models), cards))
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        for number in range(4 * args.rounds):
            if number % 4 in (0, 3):
                total, encode = served(http, body)
                times["served"].append(total)
                times["encode"].append(encode)
            else:
                times["inside"].append(inside(local, cards[args.model], body, number))
        server.stop()
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
