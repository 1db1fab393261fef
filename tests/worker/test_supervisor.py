"""Requests through the supervisor and a live process: answers, order, failures, cancelling, the books."""

import asyncio

import numpy as np
import pytest

from app.errors import Cancelled, InvalidValue, ModelNotFound
from app.report import Failure, Preview, Progress, Result, Tick
from app.request import ClassLabel, ImageSpec, Prompt, Refiner
from tests.parts.fake_worker import RATE, colour
from tests.parts.requests import changed, refused
from tests.parts.supervising import job, request, serving
from tests.parts.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def shared():
    """One supervisor and its event loop for the tests that leave it as they found it."""
    with asyncio.Runner() as runner:
        context = serving()
        here = runner.run(context.__aenter__())
        yield runner, here
        runner.run(context.__aexit__(None, None, None))


@pytest.fixture
def play(shared):
    """Runs scenario(here) on the shared supervisor, whose books must be empty afterwards."""
    runner, here = shared

    def run_shared(scenario) -> None:
        here.reports.clear()
        runner.run(asyncio.wait_for(scenario(here), 3 * PATIENCE))
        assert (here.supervisor.queues, here.supervisor.running, here.supervisor.waiting) == ([0.0], 0, 0)
        assert (here.supervisor.live, here.supervisor.restarts) == (1, 0)

    return run_shared


def test_images_come_in_order_with_their_own_seeds(play):
    async def scenario(here):
        asked = request(seeds=(5, 6, 7))
        results = await here.supervisor.submit(job(asked))
        assert [(result.index, result.seed) for result in results] == [(0, 5), (1, 6), (2, 7)]
        for result in results:
            assert result.pixels.shape == (32, 32, 3)
            assert tuple(result.pixels[0, 0]) == colour(Prompt("a cat"), result.seed)
        label = request(images=(ImageSpec(ClassLabel(3), 1),), keep_latents=True)
        (result,) = await here.supervisor.submit(job(label))
        assert tuple(result.pixels[-1, -1]) == colour(ClassLabel(3), 1)
        assert result.latents.dtype == np.float32

    play(scenario)


def test_progress_and_previews_reach_only_their_request(play):
    async def scenario(here):
        heard = []
        loud = request(steps=6, previews=2, progress=True)
        quiet = here.supervisor.submit(job(steps=6, on_report=heard.append))
        other = []
        await here.supervisor.submit(job(loud, on_report=other.append))
        await quiet
        assert [type(report) for report in heard] == [Result]
        assert {report.request_id for report in other} == {loud.id}
        steps = [report.step for report in other if isinstance(report, Progress)]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert [report.partial for report in other if isinstance(report, Preview)] == [0, 1]
        assert len(here.told(Result)) == 2 and here.told(Tick)

    play(scenario)


def test_a_listener_that_fails_harms_nobody(play):
    async def scenario(here):
        results = await here.supervisor.submit(job(on_report=lambda _: 1 / 0))
        assert len(results) == 1
        assert len(await here.supervisor.submit(job())) == 1

    play(scenario)


def test_failures_come_as_what_they_are_and_alone(play):
    async def scenario(here):
        good = [here.supervisor.submit(job(seeds=(1, 2), steps=20)) for _ in range(3)]
        for text, code in (("!nan", "non_finite_output"), ("!load", "model_load_failed")):
            with refused(code):
                await here.supervisor.submit(job(text, seeds=(1, 2), model="other"))
        with pytest.raises(ModelNotFound):
            await here.supervisor.submit(job(model="nobody"))
        assert [len(results) for results in await asyncio.gather(*good)] == [2, 2, 2]
        assert here.supervisor.restarts == 0

    play(scenario)


def test_cancelling_the_future_cancels_the_request(play):
    async def scenario(here):
        heard = []
        asked = request("!slow 60", steps=500, progress=True)
        future = here.supervisor.submit(job(asked, on_report=heard.append))
        await until(lambda: heard and here.supervisor.running)
        assert sum(here.supervisor.queues) > 0
        future.cancel()
        await asyncio.sleep(0)
        assert (sum(here.supervisor.queues), here.supervisor.running, here.supervisor.waiting) == (0.0, 0, 0)
        count = len(heard)
        await until(lambda: here.told(Failure))
        assert isinstance(here.told(Failure)[0].error, Cancelled)
        await here.supervisor.submit(job())
        assert len(heard) == count
        assert here.told(Tick)[-1].rows == 1

    play(scenario)


def test_a_task_that_is_cancelled_cancels_its_request(play):
    async def scenario(here):

        async def client():
            await here.supervisor.submit(job("!slow 60", steps=100))

        task = asyncio.create_task(client())
        await until(lambda: here.supervisor.running)
        task.cancel()
        await asyncio.wait({task})
        await until(lambda: here.told(Failure))
        assert sum(here.supervisor.queues) == 0.0

    play(scenario)


def test_books_follow_the_images(play):
    async def scenario(here):
        supervisor = here.supervisor
        await until(lambda: supervisor.ready)
        future = supervisor.submit(job("!slow 0.5", seeds=(1, 2, 3), steps=10, guided=True))
        assert sum(supervisor.queues) == pytest.approx(3 * (10 * 2 + 2) * RATE)
        assert (supervisor.running, supervisor.waiting) == (0, 3)
        await until(lambda: supervisor.running == 3)
        assert supervisor.waiting == 0
        await future
        assert (sum(supervisor.queues), supervisor.running, supervisor.waiting) == (0.0, 0, 0)

    play(scenario)


def test_books_count_both_halves_of_a_heun_step(play):
    async def scenario(here):
        await until(lambda: here.supervisor.ready)
        future = here.supervisor.submit(job("!slow 0.3", steps=10, sampler="flow_heun"))
        assert sum(here.supervisor.queues) == pytest.approx((2 * 10 - 1 + 2) * RATE)
        await future

    play(scenario)


def test_what_the_schedule_does_not_have_is_refused_at_once(play):
    async def scenario(here):
        for wrong, param in (({"sampler": "ddim"}, "sampler"), ({"steps": 0}, "num_inference_steps")):
            with pytest.raises(InvalidValue) as refused:
                here.supervisor.submit(job(**wrong))
            assert refused.value.param == param

    play(scenario)


def test_an_id_is_in_flight_once(play):
    async def scenario(here):
        asked = request()
        future = here.supervisor.submit(job(asked))
        with pytest.raises(InvalidValue):
            here.supervisor.submit(job(asked))
        await future
        await here.supervisor.submit(job(asked))

    play(scenario)


def test_a_refiner_that_no_card_has_is_refused_at_once(play):
    async def scenario(here):
        with pytest.raises(ModelNotFound, match='"none"'):
            here.supervisor.submit(job(changed(request(), refiner=Refiner("none", 0.5))))

    play(scenario)
