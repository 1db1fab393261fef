"""The real worker, in which a fault lands where a test wants it: `gated_worker.py FOLDER FD PULSE PAGE`.

FOLDER/gate has a phase (load, adapter, source, encode, denoise, decode) and a number: a process that begins this phase,
and has done so that many times since the file is there, renames it to `landed-PID` and waits until that is gone, or for
WAIT s. While FOLDER/broken is there, the process ends with 1 at its start.

A prompt "!PHASE ACT" does something when that phase is about to be computed, a denoise at its third line:

    kill       the process kills itself
    exit       the process ends by itself
    error      the forward raises an error
    oom        the forward runs out of memory
    nan        a number of the latent is none from now on
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

WAIT = 60.0
"""Seconds. The front is as patient with such a process."""


class Gate:
    """The file `gate` of a folder, as one process sees it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "gate"
        self._seen, self._begun = 0, 0

    def begin(self, phase: str) -> None:
        """Wait if the gate is for this phase, and it was begun so many times since the gate is there."""
        try:
            made, (wanted, least) = self.file.stat().st_mtime_ns, self.file.read_text().split()
            if wanted != phase:
                return
            self._begun = self._begun + 1 if made == self._seen else 0
            self._seen = made
            if self._begun < int(least):
                return
            landed = self.file.rename(self.file.with_name(f"landed-{os.getpid()}"))
        except FileNotFoundError:  # there is none, or another process has just taken it
            return
        until = time.monotonic() + WAIT
        while landed.exists() and time.monotonic() < until:
            time.sleep(0.01)


def act(what: str, runner: Any, row: Any) -> None:
    """What a prompt asks for, where its row is about to be computed."""
    import torch

    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "error":
            raise RuntimeError("as asked")
        case "oom":
            raise torch.OutOfMemoryError("as asked")
        case "nan":
            runner.slots[row.key].x[row.slot].view(-1)[0] = float("nan")


def gated(gate: Gate, phase: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """A phase of the Runner with the gate, and what prompts ask for, before it."""

    @wraps(compute)
    def run(self: Any, rows: list[Any], work: Any) -> Any:
        gate.begin(phase)
        for row in rows:
            first, _, what = getattr(row.condition, "text", "").partition(" ")
            if first == f"!{phase}" and (phase != "denoise" or row.line == 2):
                act(what, self, row)
        return compute(self, rows, work)

    return run


def reading(gate: Gate, phase: str, read: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the loader with the gate before it."""

    @wraps(read)
    def run(*given: Any) -> Any:
        gate.begin(phase)
        return read(*given)

    return run


def main(folder: Path) -> None:
    if (folder / "broken").exists():
        sys.exit(1)
    from app.engine import row
    from app.engine.runner import Runner
    from app.pool import builder, memory
    from app.worker import process

    row.LEAST = row.MOST = 2 * WAIT
    gate = Gate(folder)
    for phase in ("source", "encode", "denoise", "decode"):
        setattr(Runner, phase, gated(gate, phase, getattr(Runner, phase)))
    builder.read_parts = reading(gate, "load", builder.read_parts)
    memory.read_adapter = reading(gate, "adapter", memory.read_adapter)
    process.main()


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
