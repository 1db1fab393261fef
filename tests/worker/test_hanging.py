"""The real engine with a forward that never returns, while it draws or measures: ended by what it had announced."""

import asyncio

import pytest

from app.cards.cards import read_cards
from app.request import ImageSpec, Prompt, Request
from app.settings import Settings
from app.worker import supervisor
from app.worker.supervisor import Supervisor
from tests.parts.requests import flat, refused
from tests.parts.supervising import job
from tests.parts.waiting import until
from tests.parts.workers import faulty

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_restarts")]

MODEL = "tiny-sd3-turbo"


def picture(text: str) -> Request:
    return flat(text, MODEL, (ImageSpec(Prompt(text), 1),), 32, 32, "flow_euler", 4, 0.0, 24)


@pytest.mark.parametrize(
    ("fault", "phase", "deaths", "error"),
    [
        ("hang", "denoise", 2, ("crashed", "twice while it computed this request alone")),
        ("unmeasured", "profile", 2, ("crashed", "2 times while it measured 32x32")),
    ],
)
def test_a_forward_that_never_returns_is_ended_and_the_engine_starts_again(
    tiny, tmp_path, caplog, monkeypatch, fault, phase, deaths, error
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(supervisor, "LOADS", 2)

    async def scenario():
        settings = Settings(devices="cpu", models=tiny, cache=tmp_path)
        supervisor = Supervisor(settings, read_cards(settings.models), command=faulty(fault))
        await supervisor.start()
        try:
            (first,) = supervisor.pids
            if fault == "hang":
                assert len(await supervisor.submit(job(picture("a cat")))) == 1
            with refused(*error):
                await supervisor.submit(job(picture("hang")))
            await until(lambda: supervisor.live, 100)
            assert supervisor.restarts == deaths and supervisor.pids != [first]
            with refused(*error):
                supervisor.submit(job(picture("hang")))
            if fault == "hang":
                assert len(await supervisor.submit(job(picture("a dog")))) == 1
        finally:
            await supervisor.stop(0)

    asyncio.run(asyncio.wait_for(scenario(), 200))
    assert any(f'hung in phase "{phase}"' in record.getMessage() for record in caplog.records)
