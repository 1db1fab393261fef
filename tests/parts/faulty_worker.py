"""The real worker with a fault planted in it: `python tests/parts/faulty_worker.py FAULT FD PULSE`.

    hang       the forward of the prompt "hang" never returns
    unmeasured no forward of a measurement returns
    leak       half a megabyte of every decoded image is kept
    poison     a step of the prompt "poison" breaks the device for the whole process

One that hangs has 5 seconds of patience at most, so that tests need not wait half a minute. A GPU is poisoned by an
index past the end of a tensor, which its kernel finds, and after which every call of CUDA fails; a CPU by the error
that torch raises then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from app.engine import limits, profile, runner
from app.engine.row import Row
from app.families.base import Family
from app.request import Key, Prompt
from app.worker import process

KEPT: list[np.ndarray] = []
_denoise, _decode = runner.Runner._denoise, runner.Runner._decode


def _asks_for(text: str, rows: list[Row]) -> bool:
    return any(isinstance(row.condition, Prompt) and row.condition.text == text for row in rows)


def hanging(self: runner.Runner, rows: list[Row], outcome: runner.Outcome) -> None:
    if _asks_for("hang", rows):
        time.sleep(1_000_000)
    _denoise(self, rows, outcome)


def never(family: Family, key: Key) -> Callable[[int], None]:
    return lambda passes: time.sleep(1_000_000)


def leaking(self: runner.Runner, rows: list[Row], outcome: runner.Outcome) -> None:
    _decode(self, rows, outcome)
    KEPT.extend(np.ones(1 << 19, np.uint8) for _ in rows)


def poisoned(self: runner.Runner, rows: list[Row], outcome: runner.Outcome) -> None:
    if _asks_for("poison", rows):
        device = self._pool.device
        if device.type != "cuda":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        torch.zeros(4, device=device)[torch.full((4,), 1 << 20, device=device)].add_(1)
    _denoise(self, rows, outcome)


def plant(fault: str) -> None:
    if fault in ("hang", "unmeasured"):
        limits.LEAST, limits.MOST = 4.0, 5.0
    match fault:
        case "hang":
            runner.Runner._denoise = hanging  # type: ignore[method-assign]
        case "unmeasured":
            profile._forward = never
        case "leak":
            runner.Runner._decode = leaking  # type: ignore[method-assign]
        case "poison":
            runner.Runner._denoise = poisoned  # type: ignore[method-assign]
        case _:
            sys.exit(f"no fault {fault}")


if __name__ == "__main__":
    plant(sys.argv.pop(1))
    process.main()
