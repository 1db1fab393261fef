"""The real worker with poison planted in it: a step of the prompt `poison` breaks the device for the whole process.

On a GPU by an index past the end of a tensor, which its kernel finds, and after which every call of CUDA fails; where
there is none, by the error that torch raises then.
"""

from __future__ import annotations

import torch

from app.engine import runner
from app.engine.row import Row
from app.request import Prompt
from app.worker import process

_denoise = runner.Runner._denoise


def poisoned(self: runner.Runner, rows: list[Row], outcome: runner.Outcome) -> None:
    if any(isinstance(row.condition, Prompt) and row.condition.text == "poison" for row in rows):
        device = self._pool.device
        if device.type != "cuda":
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        torch.zeros(4, device=device)[torch.full((4,), 1 << 20, device=device)].add_(1)
    _denoise(self, rows, outcome)


if __name__ == "__main__":
    runner.Runner._denoise = poisoned  # type: ignore[method-assign]
    process._run()
