"""What a long queue costs: time per image and memory at 10 to 10,000 queued: `python -m tests.bench.growth`.

MAX_WAIT is off. An engine in this process with a network that costs nothing, so that only the host's side is left, has
as many queued all the while; the supervisor with a real engine process on a tiny network, whose resident memory is read
as well as the front's, drains as many. Ends in one JSON line. Flat is what does not grow from line to line, less noise.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.jobs.body import read_body
from app.jobs.job import Job
from app.settings import Settings
from app.worker.supervisor import Supervisor
from tests.bench.host import FreeFamily
from tests.parts.engine import Bench, FakeCosts, FakePool, card, request
from tests.parts.requests import changed
from tests.parts.tiny import write_models

SIZES = (10, 100, 1000, 10_000)
WARM_UP, MEASURED = 64, 400
PASSES = 8
"""A forward is full with the shortest of the queues, so that all do the same work."""
MODEL = "tiny-sd3-turbo"


def resident(pid: int | str = "self") -> float:
    """MB of memory that the process has now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def inside(count: int) -> dict[str, float]:
    """An engine in this process, `count` queued all the while: microseconds of the host an image, and MB more."""
    pool = FakePool(FreeFamily(card(limits={"num_inference_steps": 8, "sizes": {"min": 16, "max": 64}})))
    bench = Bench(pool, costs=FakeCosts(passes=PASSES))
    numbers = itertools.count()

    def ask() -> None:
        # All alike: who goes first differs with the length of the queue, and with it what a mixture would do.
        bench.engine.submit(request(f"r{next(numbers)}", steps=8, guided=False, keep_latents=False))

    gc.collect()
    before = resident()
    for _ in range(count):
        ask()
    _replace(bench, ask, WARM_UP)
    queued, start = resident() - before, time.perf_counter()
    _replace(bench, ask, MEASURED)
    seconds = time.perf_counter() - start
    return {"us_per_image": 1e6 * seconds / MEASURED, "queued_mb": queued, "later_mb": resident() - before}


def _replace(bench: Bench, ask: Callable[[], None], images: int) -> None:
    """Turn until so many images are done; each is followed by another request."""
    done = 0
    while done < images:
        bench.engine.tick()
        new = len(bench.results)
        bench.reports.clear()  # as they would be sent
        done += new
        for _ in range(new):
            ask()


def tiny_job(number: int, card: Card) -> Job:
    asked = changed(
        request(f"t{number}", keep_latents=False), model=MODEL, steps=1 + number % 3, guided=False, guidance=1.0
    )
    return Job(asked, card, read_body({}))


async def served(folder: Path, counts: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """The supervisor and an engine process: milliseconds an image; MB of both while all are queued, and after."""
    settings = Settings(models=folder, preload=MODEL, devices="cpu", max_wait=1e9, cache=folder / "cache")
    cards = read_cards(folder)
    supervisor = Supervisor(settings, cards)
    await supervisor.start()
    found = {}
    try:
        await asyncio.gather(*(supervisor.submit(tiny_job(-1 - n, cards[MODEL])) for n in range(WARM_UP)))
        for count in counts:
            pid = supervisor.pids[0]
            front, engine = resident(), resident(pid)
            start = time.perf_counter()
            jobs = [supervisor.submit(tiny_job(number, cards[MODEL])) for number in range(count)]
            submitted = time.perf_counter() - start
            await jobs[0]
            peak = resident() - front, resident(pid) - engine
            await asyncio.gather(*jobs)
            seconds = time.perf_counter() - start
            del jobs
            gc.collect()
            facts = {
                "ms_per_image": 1e3 * seconds / count, "submit_us": 1e6 * submitted / count,
                "front_queued_mb": peak[0], "engine_queued_mb": peak[1],
                "front_left_mb": resident() - front, "engine_left_mb": resident(pid) - engine,
            }  # fmt: skip
            found[count] = tell("served", count, facts)
    finally:
        await supervisor.stop(0)
    return found


def tell(way: str, count: int, facts: dict[str, float]) -> dict[str, float]:
    words = "   ".join(f"{name} {value:.2f}" for name, value in facts.items())
    print(f"{way:7} {count:6} queued   {words}", flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="queued in the engine")
    parser.add_argument("--served", type=int, default=SIZES[-1], help="queued through the supervisor")
    args = parser.parse_args()
    counts = tuple(size for size in SIZES if size <= args.most)
    through = tuple(size for size in SIZES if size <= args.served)
    torch.set_num_threads(1)
    inside(WARM_UP)  # what torch sets up once
    lines: dict[str, dict[int, dict[str, float]]] = {"engine": {}, "served": {}}
    for count in counts:
        lines["engine"][count] = tell("engine", count, inside(count))
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        lines["served"] = asyncio.run(served(Path(name), through))
    rounded = {
        way: {count: {key: round(value, 3) for key, value in facts.items()} for count, facts in rows.items()}
        for way, rows in lines.items()
    }
    print(json.dumps({"bench": "growth", "date": str(date.today()), **rounded}))


if __name__ == "__main__":
    main()
