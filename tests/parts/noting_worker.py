"""The real worker, which notes its denoising forwards and cancels: `python tests/parts/noting_worker.py FILE FD PULSE`.

A line of FILE is the seconds of the monotonic clock, then "forward" as one begins with the number of its rows by their
prompts' first word, or "cancel" as one comes. A FILE with the suffix .deaf makes one that does not act on cancels.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from app.engine import engine, runner
from app.worker import process

CANCEL, DENOISE = engine.Engine.cancel, runner.Runner.denoise


def main(file: Path) -> None:
    notes = file.open("a", encoding="utf-8", buffering=1)

    def note(*words: object) -> None:
        notes.write(json.dumps([time.monotonic(), *words]) + "\n")

    def denoise(self: runner.Runner, rows: list[Any], work: Any) -> None:
        note("forward", Counter(row.condition.text.partition(" ")[0] for row in rows))
        DENOISE(self, rows, work)

    def cancel(self: engine.Engine, request_id: str) -> None:
        note("cancel")
        if file.suffix != ".deaf":
            CANCEL(self, request_id)

    runner.Runner.denoise = denoise  # type: ignore[method-assign]
    engine.Engine.cancel = cancel  # type: ignore[method-assign]
    process.main()


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
