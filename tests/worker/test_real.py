"""The real process on tiny checkpoints: two of them draw the same picture, freeze, die, and draw it again."""

import asyncio
import os
import signal

import numpy as np
import pytest

from app.card import read_cards
from app.errors import NoWorker
from app.report import Progress
from app.request import ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker import keeper, link
from app.worker.supervisor import Supervisor
from tests.tiny import write_models

MODEL = "tiny-sd3-turbo"


def picture(identity: str, *, images: int = 1, steps: int = 4, progress: bool = False) -> Request:
    specs = tuple(ImageSpec(Prompt("a red square" if images == 1 else identity), seed) for seed in range(images))
    return Request(identity, MODEL, specs, 32, 48, "flow_euler", steps, False, 0.0, 24, progress=progress)


async def ready(supervisor: Supervisor, live: int) -> None:
    async with asyncio.timeout(100):
        while not (supervisor.ready and supervisor.live == live):
            await asyncio.sleep(0.05)


async def working(supervisor: Supervisor, identity: str) -> asyncio.Future:
    """A long request, and its first sign of work."""
    begun = asyncio.Event()
    request = picture(identity, images=10, steps=100, progress=True)
    future = supervisor.submit(request, lambda report: begun.set() if isinstance(report, Progress) else None)
    async with asyncio.timeout(100):
        await begun.wait()
    return future


async def scenario(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    await ready(supervisor, live=2)
    both = await asyncio.gather(supervisor.submit(picture("one")), supervisor.submit(picture("two")))
    (one,), (two,) = both
    assert one.pixels.shape == (48, 32, 3) and one.pixels.std() > 1.0
    assert np.array_equal(one.pixels, two.pixels)
    assert supervisor.states[MODEL].rates["32x48"] > 0.0

    stuck = await working(supervisor, "stuck")
    assert sorted(supervisor.queues)[0] == 0.0 < supervisor.queued_seconds
    pids = supervisor.pids
    frozen = pids.pop(supervisor.queues.index(max(supervisor.queues)))
    os.kill(frozen, signal.SIGSTOP)
    with monkeypatch.context() as impatient:
        impatient.setattr(link, "MAX_SILENCE", 1.0)
        # One restart, of the other, is enough to wait for here.
        impatient.setattr(keeper, "HEALTHY", 0.0)
        impatient.setattr(keeper, "FIRST_DELAY", 600.0)
        with pytest.raises(NoWorker):
            await stuck

    lost = await working(supervisor, "lost")
    (killed,) = pids
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(NoWorker):
        await lost
    assert supervisor.queued_seconds == 0.0

    await ready(supervisor, live=1)
    assert supervisor.restarts == 1 and not {frozen, killed} & set(supervisor.pids)
    (again,) = await supervisor.submit(picture("again"))
    assert np.array_equal(again.pixels, one.pixels)


@pytest.mark.timeout(300)
def test_two_real_processes_draw_freeze_die_and_draw_again(tmp_path, monkeypatch):
    write_models(tmp_path / "models")
    settings = Settings(devices="cpu,cpu", dtype="float32", preload=MODEL, cache=tmp_path / "cache")
    supervisor = Supervisor(settings, read_cards(tmp_path / "models"))

    async def serve():
        await supervisor.start()
        pids = supervisor.pids
        try:
            await scenario(supervisor, monkeypatch)
        finally:
            await supervisor.stop(0)
        assert supervisor.pids == [0, 0] and 0 not in pids

    asyncio.run(serve())
