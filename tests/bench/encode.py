"""What image files cost: `python -m tests.bench.encode`. Ends in one JSON line.

First the seconds of one 1024 x 1024 file, on one core, beside Pillow's own PNG of the same picture. Then how late an
event loop wakes while four threads make 64 files, and while they make 64 whole replies (`app/jobs/replies.py`).
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.cards.cards import read_card
from app.imaging import FORMATS, Format, encode_image
from app.jobs.body import read_body
from app.jobs.job import Job
from app.jobs.replies import answer, completed_event
from app.report import Result, Timings

MODELS = Path(__file__).parents[2] / "models"
SIDE, TIMES, FILES = 1024, 25, 64
FACTS = {"model": "m", "prompt": "a red apple on a blue background", "seed": 1, "size": f"{SIDE}x{SIDE}"}
THREADS = 4
"""As in `app/api/front.py`."""


def pictures() -> dict[str, np.ndarray]:
    """Clouds: octaves of smooth noise and a little grain, as a photograph has; the drawn grid of models/, enlarged."""
    rng = np.random.default_rng(0)
    sheet = np.zeros((SIDE, SIDE, 3))
    for octave in range(2, 9):
        small = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        sheet += np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 2 ** (octave - 1)
    clouds = sheet + rng.normal(0, 1.5, sheet.shape)
    drawn = Image.open(MODELS / "grid.png").convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return {"clouds": clouds.clip(0, 255).astype(np.uint8), "drawn": np.asarray(drawn)}


def milliseconds(call: Callable[[], bytes]) -> tuple[float, float, int]:
    """(median wall, median CPU time of this thread, size of the file in KB) over TIMES calls."""
    walls, cpus, size = [], [], 0
    for _ in range(TIMES):
        wall, cpu = time.perf_counter(), time.thread_time()
        size = len(call())
        walls.append((time.perf_counter() - wall) * 1e3)
        cpus.append((time.thread_time() - cpu) * 1e3)
    return statistics.median(walls), statistics.median(cpus), size // 1024


def pillows(pixels: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def files() -> dict[str, float]:
    """Median CPU milliseconds of each file, and the worst picture's PNG in wall time."""
    found: dict[str, float] = {}
    print(f"{'one file':24} {'wall ms':>8} {'cpu ms':>8} {'KB':>6}")
    for name, pixels in pictures().items():
        ours = {format: partial(encode_image, pixels, format, None, FACTS) for format in FORMATS}
        for format, call in {**ours, "png of Pillow": partial(pillows, pixels)}.items():
            wall, cpu, size = milliseconds(call)
            print(f"{name + ' ' + format:24} {wall:8.1f} {cpu:8.1f} {size:6}")
            found[f"{name}_{format.replace(' ', '_')}"] = round(cpu, 1)
            if format == "png":
                found["png_wall"] = max(found.get("png_wall", 0.0), round(wall, 1))
    return found


async def lateness(calls: list[Callable[[], Any]]) -> tuple[float, float]:
    """(99th percentile, most) of the milliseconds that a sleep of 1 ms ends late while THREADS threads do the calls."""
    loop, late = asyncio.get_running_loop(), []
    with ThreadPoolExecutor(THREADS) as pool:
        todo = [loop.run_in_executor(pool, call) for call in calls]
        while not all(one.done() for one in todo):
            due = time.perf_counter() + 1e-3
            await asyncio.sleep(1e-3)
            late.append((time.perf_counter() - due) * 1e3)
    return float(np.percentile(late, 99)), max(late)


def asked(format: Format, results: int) -> tuple[Job, list[Result]]:
    """A request that is done: `results` images of the clouds."""
    card = read_card(MODELS / "emoji-mmdit" / "card.toml")
    body = read_body({"prompt": "a red apple", "seed": 1, "n": results, "output_format": format})
    timings = Timings(queue=0.0, encode=0.0, denoise=1.0, decode=0.1, steps=4, shared=1.0)
    clouds = pictures()["clouds"]
    done = [Result("id", index, 1 + index, clouds, timings) for index in range(results)]
    return Job(body.to_request(card, "id"), card, body, format), done


def lags() -> dict[str, float]:
    """Event loop lag by what the threads make."""
    clouds, found = pictures()["clouds"], {}
    work: dict[str, list[Callable[[], Any]]] = {"nothing": [partial(time.sleep, 0.05)] * FILES}
    for format in FORMATS:
        work[f"64 {format}"] = [partial(encode_image, clouds, format, None, FACTS)] * FILES
    for format in FORMATS:
        work[f"64 replies of 1 {format}"] = [partial(answer, *asked(format, 1))] * FILES
        work[f"8 replies of 8 {format}"] = [partial(answer, *asked(format, 8))] * (FILES // 8)
    work["64 events of 1 png"] = [partial(completed_event, *asked("png", 1))] * FILES
    print(f"{'the loop wakes late by':24} {'p99 ms':>8} {'most':>8}")
    for name, calls in work.items():
        high, most = asyncio.run(lateness(calls))
        print(f"{name:24} {high:8.1f} {most:8.1f}")
        found[f"lag_{name.replace(' ', '_')}"] = round(high, 1)
    return found


def main() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    found = files()
    os.sched_setaffinity(0, cores)
    found |= lags()
    about = {"bench": "encode", "cores": len(cores), "date": str(date.today()), "machine": platform.processor()}
    print(json.dumps({**about, **found}))


if __name__ == "__main__":
    main()
