"""Machine: what a measurement was taken on, and the most that the machine can do: its ceilings.

Knows nothing of models or of what is measured.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from app.engine.profile import processor

MATMULS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Sides of the square matrices that are multiplied; the best of them is the ceiling."""

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes that are copied: far more than any cache holds."""

REPEATS = 5


class Ceilings(NamedTuple):
    """flops: floating point operations a second of a matrix product. bytes: read and written a second by a copy."""

    flops: float
    bytes: float

    def floor(self, flops: float, bytes_: float) -> float:
        """Seconds that so much work takes at the least."""
        return max(flops / self.flops, bytes_ / self.bytes)


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured here and now, with the threads that torch has, in about two seconds."""
    rates = []
    for side in MATMULS[device.type]:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * side**3 / _least(lambda a=a, b=b: a @ b, device))  # type: ignore[misc]
    source = torch.zeros(COPIED[device.type] // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return Ceilings(max(rates), 2 * source.nbytes / _least(lambda: target.copy_(source), device))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """Machine, date and versions: without them a number says nothing."""
    return {
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the checkout that runs, with a + when files differ from it; "" outside a checkout."""
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip()


def _least(work: Callable[[], object], device: torch.device) -> float:
    work()
    samples = []
    for _ in range(REPEATS):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        samples.append(time.perf_counter() - start)
    return min(samples)
