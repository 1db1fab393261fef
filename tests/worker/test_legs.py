"""The real process, killed while a row is between its models: the request begins anew and draws the same picture."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from app.jobs.job import Job
from app.report import Progress
from app.request import ImageSpec, Prompt
from app.settings import Settings
from app.worker.supervisor import Supervisor
from tests.parts import gated_worker
from tests.parts.refined import PAIRS, pairs, refined
from tests.parts.requests import flat
from tests.parts.supervising import job
from tests.parts.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_restarts")]

MODEL, STEPS, SWITCH = "tiny-sd3", 8, 6
"""The model draws the first SWITCH lines."""


def picture(name: str) -> Job:
    images = (ImageSpec(Prompt("a red square"), 5),)
    return job(
        refined(flat(name, MODEL, images, 32, 32, "flow_euler", STEPS, 3.0, 24, keep_latents=True, progress=True), 0.5)
    )


async def kill(supervisor: Supervisor) -> None:
    (pid,) = supervisor.pids
    os.kill(pid, signal.SIGKILL)
    await until(lambda: supervisor.pids != [pid])


def gate(folder: Path, phase: str, least: int) -> None:
    """A process stands still where it has begun this phase so many times from now on."""
    for file in folder.glob("landed-*"):
        file.unlink()
    (folder / "gate").write_text(f"{phase} {least}")


async def killed(supervisor: Supervisor, folder: Path, asked: Job) -> None:
    """Kill the process once it stands there, with this job."""
    await until(lambda: list(folder.glob("landed-*")) or asked.future.done(), 100)
    assert not asked.future.done()
    (pid,) = supervisor.pids
    os.kill(pid, signal.SIGKILL)
    await until(lambda: supervisor.pids != [pid])


async def scenario(supervisor: Supervisor, folder: Path) -> None:
    await until(lambda: supervisor.ready, 100)
    one, lines = picture("one"), list[int]()
    one.on_report = lambda report: lines.append(report.step) if isinstance(report, Progress) else None
    gate(folder, "load", 0)
    supervisor.submit(one)
    await until(lambda: len(lines) == SWITCH, 100)
    await asyncio.sleep(0.3)  # it waits for its second model, and the process for the gate
    await killed(supervisor, folder, one)
    assert lines == list(range(1, SWITCH + 1)) and (one.sent, one.apart) == (1, {}), "it computed nothing just then"
    (first,) = await one
    assert lines == [*range(1, SWITCH + 1), *range(1, STEPS + 1)]

    gate(folder, "encode", 1)
    two = supervisor.submit(picture("two"))
    await killed(supervisor, folder, two)
    assert (two.sent, two.apart) == (1, {0: SWITCH}), "where the second encode stands"
    (second,) = await two
    (whole,) = await supervisor.submit(picture("whole"))
    for result in (first, second):
        assert np.array_equal(result.latents, whole.latents) and np.array_equal(result.pixels, whole.pixels)
    assert supervisor.states[PAIRS[MODEL]].state == "ready" and supervisor.restarts == 2


@pytest.mark.timeout(300)
def test_a_process_that_dies_between_the_legs_of_a_row(tiny: Path, tmp_path: Path) -> None:
    cards = pairs(tiny, tmp_path)
    settings = Settings(
        devices="cpu", dtype="float32", deterministic=True, preload=MODEL, cache=tmp_path / "cache", threads=1
    )
    (gates := tmp_path / "gates").mkdir()
    command = (sys.executable, "-P", gated_worker.__file__, str(gates))
    supervisor = Supervisor(settings, cards, command=command)

    async def serve() -> None:
        await supervisor.start()
        try:
            await scenario(supervisor, gates)
        finally:
            await supervisor.stop(0)

    asyncio.run(serve())
