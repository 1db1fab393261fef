"""The real process on tiny checkpoints: two draw the same picture, freeze, die, and draw it again, bit for bit."""

import asyncio
import os
import signal

import numpy as np
import pytest

from app.cards.card import read_cards
from app.jobs.job import Job
from app.report import Progress, Result
from app.request import ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker import child
from app.worker.supervisor import Supervisor
from tests.parts.requests import flat, refused
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


async def working(supervisor: Supervisor, identity: str) -> Job:
    """A request that outlasts the test, and its first sign of work."""
    begun = asyncio.Event()
    long = picture(identity, images=10, steps=900, progress=True)
    long.on_report = lambda report: begun.set() if isinstance(report, Progress) else None
    supervisor.submit(long)
    async with asyncio.timeout(100):
        await begun.wait()
    return long


async def scenario(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    await ready(supervisor, live=2)
    both = [supervisor.submit(picture("one")), supervisor.submit(picture("two"))]
    assert all(supervisor.queues)
    (one,), (two,) = await asyncio.gather(*both)
    assert one.pixels.shape == (48, 32, 3) and one.pixels.std() > 1.0
    assert same(one, two)
    assert supervisor.states[MODEL].rates["32x48"] > 0.0

    stuck = await working(supervisor, "stuck")
    pids = supervisor.pids
    frozen = pids.pop(supervisor.queues.index(max(supervisor.queues)))
    # Both at work, so that both requests are lost.
    lost = await working(supervisor, "lost")
    assert all(supervisor.queues)
    with monkeypatch.context() as impatient:
        # One restart, of the other, is enough to wait for here.
        impatient.setattr(child, "HEALTHY", 0.0)
        impatient.setattr(child, "FIRST_DELAY", 600.0)
        os.kill(frozen, signal.SIGSTOP)
        with refused("no_worker"):
            await stuck

    (killed,) = pids
    os.kill(killed, signal.SIGKILL)
    with refused("no_worker"):
        await lost
    assert sum(supervisor.queues) == 0.0

    await ready(supervisor, live=1)
    assert supervisor.restarts == 1 and not {frozen, killed} & set(supervisor.pids)
    company = supervisor.submit(picture("company", images=3, steps=6))
    (again,) = await supervisor.submit(picture("again"))
    assert same(again, one)
    assert len(await company) == 3


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
