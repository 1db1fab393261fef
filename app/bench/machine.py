"""The machine of a measurement: what it is, the most that it can do, and how ways to work are timed on it in turns."""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from app.pool.budget import processor
from app.settings import Settings
from app.worker import plan
from app.worker.process import resolve_dtype

Samples = dict[str, list[float]]
"""Seconds of every measurement, by the name of what was measured."""

MATMULS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Sides of the square matrices that are multiplied; the best of them is the ceiling."""

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes that are copied: far more than any cache holds."""

REPEATS = 5


def milliseconds(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and most of these seconds, in milliseconds."""
    found = {"median": statistics.median(samples), "least": min(samples), "most": max(samples)}
    return {name: round(1e3 * value, 4) for name, value in found.items()}


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once a round, in the order A B, B A, A B: drift of the machine is shared by all."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def alternate(ways: Mapping[str, Callable[[], float]], rounds: int, warm_ups: int = 2) -> Samples:
    """Call every way in turns, and return the seconds that it returns after the warm-ups."""
    samples: Samples = {name: [] for name in ways}
    for name in turns(tuple(ways), warm_ups):
        ways[name]()
    for name in turns(tuple(ways), rounds):
        samples[name].append(ways[name]())
    return samples


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call and the work that it starts on the device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until a GPU has done its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure matmul_gflops, 1e9 operations a second of a matrix product, and copy_gbytes, 1e9 bytes a second.

    It takes about two seconds, with the threads that torch has now. A copy both reads and writes its bytes.
    """
    rates = []
    for side in MATMULS[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * side**3 / _least(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
    source = torch.zeros(COPIED[device.type] // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _least(lambda: target.copy_(source), device)
    return {"matmul_gflops": max(rates) / 1e9, "copy_gbytes": copied / 1e9}


def _least(work: Callable[[], object], device: torch.device) -> float:
    work()
    return min(seconds(work, device) for _ in range(REPEATS))


def facts(settings: Settings) -> dict[str, str | int]:
    """The machine, the number format, the versions and the date, without which a measurement cannot be repeated."""
    name = plan.devices(settings.devices)[0]
    return {
        "machine": processor() if name == "cpu" else torch.cuda.get_device_name(name),
        "threads": plan.threads(settings),
        "dtype": str(resolve_dtype(settings, name)).removeprefix("torch."),
        "compiled": settings.compile,
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
