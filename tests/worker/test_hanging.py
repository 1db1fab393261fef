"""The real engine with a forward that never returns, while it draws or measures: ended by what it had announced."""

import asyncio

import pytest

from app.cards.card import read_cards
from app.request import ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker.supervisor import Supervisor
from tests.parts.requests import flat, refused
from tests.parts.supervising import job
from tests.parts.waiting import until
from tests.parts.workers import faulty

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_restarts")]

MODEL = "tiny-sd3-turbo"


def picture(text: str) -> Request:
    return flat(text, MODEL, (ImageSpec(Prompt(text), 1),), 32, 32, "flow_euler", 4, 0.0, 24)


@pytest.mark.parametrize(("fault", "phase"), [("hang", "denoise"), ("unmeasured", "profile")])
def test_a_forward_that_never_returns_is_ended_and_the_engine_starts_again(
    tiny, tmp_path, caplog, monkeypatch, fault, phase
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    async def scenario():
        settings = Settings(devices="cpu", models=tiny, cache=tmp_path)
        supervisor = Supervisor(settings, read_cards(settings.models), command=faulty(fault))
        await supervisor.start()
        try:
            (first,) = supervisor.pids
            if fault == "hang":
                assert len(await supervisor.submit(job(picture("a cat")))) == 1
            with refused("no_worker", match="died while it worked"):
                await supervisor.submit(job(picture("hang")))
            await until(lambda: supervisor.live, 100)
            assert supervisor.restarts == 1 and supervisor.pids != [first]
            if fault == "hang":
                assert len(await supervisor.submit(job(picture("a dog")))) == 1
        finally:
            await supervisor.stop(0)

    asyncio.run(asyncio.wait_for(scenario(), 200))
    assert any(f'hung in phase "{phase}"' in record.getMessage() for record in caplog.records)
