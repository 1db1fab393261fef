"""The real process on tiny checkpoints: two draw the same picture, freeze, die, and draw it again, bit for bit."""

import asyncio
import os
import signal

import numpy as np
import pytest

from app.cards.cards import read_cards
from app.jobs.job import Job
from app.report import Progress, Result
from app.request import ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker import child
from app.worker.supervisor import Supervisor
from tests.parts.requests import flat
from tests.parts.supervising import job
from tests.parts.waiting import until

pytestmark = pytest.mark.slow

MODEL = "tiny-sd3-turbo"


def picture(identity: str, *, images: int = 1, steps: int = 4, progress: bool = False) -> Request:
    specs = tuple(ImageSpec(Prompt("a red square" if images == 1 else identity), seed) for seed in range(images))
    facts = {"keep_latents": True, "progress": progress}
    return job(flat(identity, MODEL, specs, 32, 48, "flow_euler", steps, 0.0, 24, **facts))


def same(one: Result, other: Result) -> bool:
    """Bit for bit."""
    return np.array_equal(one.latents, other.latents) and np.array_equal(one.pixels, other.pixels)


async def ready(supervisor: Supervisor, live: int) -> None:
    def states() -> list[str]:
        return [worker.backlog.state(MODEL).state for worker in supervisor.children if worker.live]

    await until(lambda: states() == ["ready"] * live, 100)
    assert supervisor.ready


async def line(asked: Job, least: int) -> None:
    """Wait until the job has come past this line, in the process that has it now."""
    lines: list[int] = []
    asked.on_report = lambda report: lines.append(report.step) if isinstance(report, Progress) else None
    asked.on_restart = lines.clear
    async with asyncio.timeout(100):
        while max(lines, default=0) <= least:
            await asyncio.sleep(0.002)


async def scenario(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    await ready(supervisor, live=2)
    both = [supervisor.submit(picture("one")), supervisor.submit(picture("two"))]
    assert all(supervisor.queues)
    (one,), (two,) = await asyncio.gather(*both)
    assert one.pixels.shape == (48, 32, 3) and one.pixels.std() > 1.0
    assert same(one, two)
    assert supervisor.states[MODEL].rates["32x48"] > 0.0

    stuck, lost = picture("stuck", steps=200, progress=True), picture("lost", steps=300, progress=True)
    supervisor.submit(stuck)
    worker = supervisor.queues.index(max(supervisor.queues))
    await line(stuck, 5)
    pids = supervisor.pids
    frozen = pids.pop(worker)
    with monkeypatch.context() as impatient:
        # One restart, of the other, is enough to wait for here.
        impatient.setattr(child, "HEALTHY", 0.0)
        impatient.setattr(child, "FIRST_DELAY", 600.0)
        os.kill(frozen, signal.SIGSTOP)
        await until(lambda: stuck.sent == 2)
    supervisor.submit(lost)
    assert (stuck.apart.keys(), lost.apart) == ({0}, {})

    await line(stuck, stuck.apart[0] + 2)
    await line(lost, 5)
    (killed,) = pids
    os.kill(killed, signal.SIGKILL)
    await until(lambda: supervisor.stranded(MODEL) == 2)
    # Which of them the death may be due to depends on the work it hit: none at all, if it fell between two.
    assert sum(supervisor.queues) == 0.0 and stuck.apart.keys() == {0}
    company = supervisor.submit(picture("company", images=3, steps=6))
    again = supervisor.submit(picture("again"))
    (unstuck,), (found,), others = await asyncio.gather(stuck, lost, company)
    assert (stuck.sent, lost.sent, company.sent) == (3, 2, 1)
    assert supervisor.restarts == 1 and not {frozen, killed} & set(supervisor.pids)

    assert same((await again)[0], one) and len(others) == 3
    for whole, steps in ((unstuck, 200), (found, 300)):
        (alone,) = await supervisor.submit(picture("alone", steps=steps))
        assert same(whole, alone)
    assert not same(unstuck, found)
    await ready(supervisor, live=1)


@pytest.mark.timeout(300)
def test_two_real_processes_draw_freeze_die_and_draw_again(tiny, tmp_path, monkeypatch):
    settings = Settings(devices="cpu,cpu", dtype="float32", deterministic=True, preload=MODEL, cache=tmp_path / "cache")
    supervisor = Supervisor(settings, read_cards(tiny))

    async def serve():
        await supervisor.start()
        pids = supervisor.pids
        try:
            await scenario(supervisor, monkeypatch)
        finally:
            await supervisor.stop(0)
        assert supervisor.pids == [0, 0] and 0 not in pids

    asyncio.run(serve())
