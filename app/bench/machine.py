"""The machine of a measurement: what it is, the most that it can do, and how ways to work are timed on it in turns."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from app.engine.costs import processor

MATMULS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Sides of the square matrices that are multiplied; the best of them is the ceiling."""

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes that are copied: far more than any cache holds."""

REPEATS = 5


class Spread(NamedTuple):
    """Of several measurements of one thing."""

    median: float
    least: float
    most: float
    samples: int

    def ms(self) -> dict[str, float]:
        """Seconds in milliseconds, as the JSON lines have them."""
        return {name: round(getattr(self, name) * 1e3, 4) for name in ("median", "least", "most")}


class Ceilings(NamedTuple):
    """flops: floating point operations a second of a matrix product. bytes: read and written a second by a copy."""

    flops: float
    bytes: float

    def floor(self, flops: float, bytes_: float) -> float:
        """The least seconds that this much work takes."""
        return max(flops / self.flops, bytes_ / self.bytes)


def spread(samples: Sequence[float]) -> Spread:
    return Spread(statistics.median(samples), min(samples), max(samples), len(samples))


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once a round, in the order A B, B A, A B: drift of the machine is shared by all."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def alternate(ways: Mapping[str, Callable[[], float]], rounds: int, warm_ups: int = 2) -> dict[str, Spread]:
    """Call every way in turns, and return the spread of the seconds that it returns after the warm-ups."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for name in turns(tuple(ways), warm_ups):
        ways[name]()
    for name in turns(tuple(ways), rounds):
        samples[name].append(ways[name]())
    return {name: spread(values) for name, values in samples.items()}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call, with what it gives the device to do."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until a GPU has done its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings with the threads that torch has now, in about two seconds."""
    rates = []
    for side in MATMULS[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * side**3 / _least(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
    source = torch.zeros(COPIED[device.type] // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return Ceilings(max(rates), 2 * source.nbytes / _least(lambda: target.copy_(source), device))


def _least(work: Callable[[], object], device: torch.device) -> float:
    work()
    return min(seconds(work, device) for _ in range(REPEATS))


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """Name machine, date and versions, without which a number says nothing."""
    return {
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the checkout that runs, with a + when files differ from it; "" outside a checkout."""
    words, here = ["git", "describe", "--always", "--dirty=+"], Path(__file__).parent
    try:
        return subprocess.run(words, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
