"""The real worker with a forward planted in it that never returns: `forward` for the prompt "hang", `profile` for any.

It has less patience than the real one, so that tests need not wait half a minute: 5 seconds at most.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from app.engine import patience, profile, runner
from app.engine.row import Row
from app.families.base import Family
from app.request import Key, Prompt
from app.worker import process

_denoise = runner.Runner._denoise


def hanging(self: runner.Runner, rows: list[Row], outcome: runner.Outcome) -> None:
    if any(isinstance(row.condition, Prompt) and row.condition.text == "hang" for row in rows):
        time.sleep(1_000_000)
    _denoise(self, rows, outcome)


def never(family: Family, key: Key) -> Callable[[int], None]:
    return lambda passes: time.sleep(1_000_000)


if __name__ == "__main__":
    patience.LEAST, patience.MOST = 4.0, 5.0
    if sys.argv.pop(1) == "forward":
        runner.Runner._denoise = hanging  # type: ignore[method-assign]
    else:
        profile._forward = never
    process._run()
