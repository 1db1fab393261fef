"""Seconds until the front sees that an engine is stopped or hangs: `python -m tests.bench.hang [--before FOLDER]`.

FOLDER: another checkout, which is measured too. Every case has a real engine with `emoji-mmdit-turbo` and a fault that
is planted in it. The cases run side by side, because they mostly wait, and start one after the other. A case that is
not seen within `--limit` says so.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MODEL = "emoji-mmdit-turbo"
APART = 12.0
FOR_EVER = 1_000_000
PYTHON = (sys.executable, "-P")
"""Without the script's folder on the path: it has a module of the name `cuda`."""

CASES = {
    "idle": "SIGSTOP while it is idle",
    "measuring": "SIGSTOP while it measures a profile",
    "drawing": "SIGSTOP while it draws",
    "forward": "a forward that never returns",
    "profile": "the same while it measures",
    "load": "a load that holds the interpreter for 60 s, not to be killed",
}


def plant(case: str, mark: Path) -> None:
    """Put the fault into this engine process; it touches `mark` when it is about to show."""
    from app.engine import costs, runner
    from app.pool import builder

    denoise, forward, read = runner.Runner.denoise, costs.forward_of, builder.read_parts

    def hanging(self: Any, rows: Any, work: Any) -> None:
        if rows[0].request.id == "fault":
            mark.touch()
            time.sleep(FOR_EVER if case == "forward" else 0.2)
        denoise(self, rows, work)

    def slow(family: Any, key: Any) -> Any:
        inner = forward(family, key)

        def run(passes: int) -> None:
            mark.touch()
            time.sleep(FOR_EVER if case == "profile" else 0.5)
            inner(passes)

        return run

    def held(*given: Any) -> Any:
        mark.touch()
        ctypes.PyDLL(None).sleep(60)
        return read(*given)

    if case in ("forward", "drawing"):
        runner.Runner.denoise = hanging  # type: ignore[method-assign]
    elif case in ("measuring", "profile"):
        costs.forward_of = slow
    elif case == "load":
        builder.read_parts = held


def engine(case: str, mark: str, descriptors: list[str]) -> None:
    """An engine process with the fault of this case."""
    from app.worker import process

    plant(case, Path(mark))
    sys.argv = ["engine", *descriptors]
    process.main()


async def watch(case: str, folder: Path, limit: float) -> str:
    """Seconds from the fault to the death of the engine that has it."""
    from app.cards.cards import read_cards
    from app.jobs.body import read_body
    from app.jobs.job import Job
    from app.settings import Settings
    from app.worker.supervisor import Supervisor

    mark = folder / "mark"
    cards = read_cards(Path.cwd() / "models")
    settings = Settings(devices="cpu", preload="" if case == "load" else MODEL, cache=folder)
    supervisor = Supervisor(settings, cards, command=(*PYTHON, __file__, "--engine", case, str(mark)))
    await supervisor.start()
    first = supervisor.pids[0]

    def ask(name: str) -> Job:
        body = read_body({"model": MODEL, "prompt": "red apple", "num_inference_steps": 50})
        return supervisor.submit(Job(body.to_request(cards[MODEL], name), cards[MODEL], body))

    if case in ("idle", "forward", "drawing"):
        await until(lambda: supervisor.ready, 100)
        await ask("good")
    if case == "idle":
        await asyncio.sleep(5)
        mark.touch()
    elif case in ("forward", "drawing"):
        ask("fault")
    elif case == "load":
        supervisor.call("load", MODEL)
    await until(mark.exists, 100)
    await asyncio.sleep(1)  # what the engine announced has arrived by now
    begin = time.monotonic()
    if case in ("idle", "measuring", "drawing"):
        os.kill(first, signal.SIGSTOP)
    loaded = lambda: case == "load" and supervisor.states[MODEL].state == "ready"  # noqa: E731
    seen = await until(lambda: first != supervisor.pids[0] or loaded(), limit)
    took, lives = time.monotonic() - begin, first == supervisor.pids[0]
    os.kill(first, signal.SIGKILL) if lives else None
    await supervisor.stop(0)
    if not seen:
        return f"not within {limit:.0f} s"
    verdict = "" if case != "load" else "lives, loaded after " if lives else "killed after "
    return f"{verdict}{took:.1f} s"


async def until(condition: Any, limit: float) -> bool:
    """Whether it held within `limit` seconds."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() > begin + limit:
            return False
        await asyncio.sleep(0.02)
    return True


def start(case: str, checkout: Path, limit: float) -> subprocess.Popen[str]:
    """A case in a process of its own, and time for its engine to start before the next."""
    words = [*PYTHON, __file__, "--case", case, "--limit", str(limit)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=checkout, text=True, **pipes)
    time.sleep(APART)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--limit", type=float, default=700.0, help="seconds until a case is given up")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--engine", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.engine or args.case:
        sys.path.insert(0, os.getcwd())  # the checkout that is measured, before the one that is installed
    if args.engine:
        return engine(args.engine[0], args.engine[1], args.engine[2:])
    if args.case:
        with tempfile.TemporaryDirectory() as folder:
            return print(asyncio.run(watch(args.case, Path(folder), args.limit)))
    checkouts = [*([args.before.resolve()] if args.before else []), ROOT]
    print("| what | before | now |\n| --- | --- | --- |" if args.before else "| what | now |\n| --- | --- |")
    running = {case: [start(case, checkout, args.limit) for checkout in checkouts] for case in args.only}
    for case, processes in running.items():
        print(f"| {CASES[case]} | " + " | ".join(one.communicate()[0].strip() for one in processes) + " |", flush=True)


if __name__ == "__main__":
    main()
