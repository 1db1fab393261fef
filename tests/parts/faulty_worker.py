"""The real worker with a fault planted in it: `python tests/parts/faulty_worker.py FAULT FD PULSE PAGE`.

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

from app.engine import costs, runner
from app.engine.row import Row, Work
from app.families.base import Family
from app.request import Key, Prompt
from app.worker import process

KEPT: list[np.ndarray] = []
DENOISE, DECODE = runner.Runner.denoise, runner.Runner.decode


def _asks_for(text: str, rows: list[Row]) -> bool:
    return any(isinstance(row.condition, Prompt) and row.condition.text == text for row in rows)


def hanging(self: runner.Runner, rows: list[Row], work: Work) -> None:
    if _asks_for("hang", rows):
        time.sleep(1_000_000)
    DENOISE(self, rows, work)


def never(family: Family, key: Key) -> Callable[[int], None]:
    return lambda passes: time.sleep(1_000_000)


def leaking(self: runner.Runner, rows: list[Row], work: Work) -> None:
    DECODE(self, rows, work)
    KEPT.extend(np.ones(1 << 19, np.uint8) for _ in rows)


def poisoned(self: runner.Runner, rows: list[Row], work: Work) -> None:
    if _asks_for("poison", rows):
        device = self.slots[rows[0].key].x.device
        if device.type != "cuda":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        torch.zeros(4, device=device)[torch.full((4,), 1 << 20, device=device)].add_(1)
    DENOISE(self, rows, work)


def plant(fault: str) -> None:
    if fault in ("hang", "unmeasured"):
        runner.LEAST, runner.MOST = 4.0, 5.0
    match fault:
        case "hang":
            runner.Runner.denoise = hanging  # type: ignore[method-assign]
        case "unmeasured":
            costs.forward_of = never
        case "leak":
            runner.Runner.decode = leaking  # type: ignore[method-assign]
        case "poison":
            runner.Runner.denoise = poisoned  # type: ignore[method-assign]
        case _:
            sys.exit(f"no fault {fault}")


if __name__ == "__main__":
    plant(sys.argv.pop(1))
    process.main()
