"""The real worker with a leak planted in it: it keeps half a megabyte of every image that it decodes."""

from __future__ import annotations

import numpy as np

from app.engine import runner
from app.engine.row import Row
from app.worker import process

KEPT: list[np.ndarray] = []
_decode = runner.Runner._decode


def leak(self: runner.Runner, rows: list[Row], outcome: runner.Outcome) -> None:
    _decode(self, rows, outcome)
    KEPT.extend(np.ones(1 << 19, np.uint8) for _ in rows)


if __name__ == "__main__":
    runner.Runner._decode = leak  # type: ignore[method-assign]
    process._run()
