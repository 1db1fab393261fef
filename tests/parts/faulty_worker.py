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

import numpy as np
import torch

from app.engine import limits
from app.engine.row import Outcome, Work
from app.engine.runner import Runner
from app.request import Prompt
from app.worker import process

KEPT: list[np.ndarray] = []
FAULTS = ("hang", "unmeasured", "leak", "poison")


def asks_for(text: str, work: Work) -> bool:
    prompts = (row.condition for row in work.rows if isinstance(row.condition, Prompt))
    return work.phase == "denoise" and any(prompt.text == text for prompt in prompts)


def plant(fault: str) -> None:
    run = Runner.run
    if fault in ("hang", "unmeasured"):
        limits.LEAST, limits.MOST = 4.0, 5.0

    def faulty(runner: Runner, work: Work) -> Outcome:
        if (fault == "hang" and asks_for("hang", work)) or (fault == "unmeasured" and work.phase == "profile"):
            time.sleep(1_000_000)
        if fault == "poison" and asks_for("poison", work):
            if not torch.cuda.is_initialized():
                raise torch.AcceleratorError("CUDA error: device-side assert triggered")
            torch.zeros(4, device="cuda")[torch.full((4,), 1 << 20, device="cuda")].add_(1)
        outcome = run(runner, work)
        if fault == "leak" and work.phase == "decode":
            KEPT.extend(np.ones(1 << 19, np.uint8) for _ in work.rows)
        return outcome

    Runner.run = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if fault not in FAULTS:
        sys.exit(f"no fault {fault}")
    plant(fault)
    process.main()
