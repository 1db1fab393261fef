"""The books of one worker in device seconds: whose, how long, what goes first; empty when all is answered."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.jobs.job import Job
from app.report import Memory, ModelState, Result, Tick, Timings
from app.request import Refiner, SkipGuidance
from app.worker.admission import Backlog, Kind, best, choose, kind_of, merge
from tests.parts.edits import edited
from tests.parts.requests import changed
from tests.parts.supervising import job, request


def backlog(**tenants: tuple[float, int]) -> Backlog:
    """Eight passes an image, one to encode and one to decode, a tenth of a second each. name=(weight, images)."""
    made = Backlog()
    made.hear(ModelState("fake", "ready", rates={"32x32": 0.1}))
    for name, (weight, images) in tenants.items():
        made.add(of(name, images=images, weight=weight))
    return made


def of(tenant: str = "", passes: int = 8, images: int = 1, **changes: object) -> Job:
    """A job of a tenant whose images take so many passes each."""
    return job(tenant=tenant, steps=passes, seeds=range(images), **changes)


def answer(books: Backlog, some: Job, images: int) -> None:
    for index in range(images):
        books.hear(Result(some.request.id, index, index, np.zeros(0), Timings(0, 0, 0, 0, 0, 0)))


def test_a_kind_counts_lines_and_both_passes_of_a_guided_image():
    asked = job(tenant="a")
    assert kind_of(asked) == Kind("a", asked.request.recipe.key, 4)
    assert kind_of(job(guided=True)).passes == 8
    assert kind_of(job(sampler="flow_heun", steps=10)).passes == 19


def test_a_kind_counts_the_lines_that_run_and_whether_there_is_a_source():
    def kind(strength: float, **changes: object) -> Kind:
        return kind_of(job(edited(request(steps=20, **changes), strength)))

    assert kind(0.6) == Kind("", request().recipe.key, 12, sourced=True)
    assert kind(0.6, guided=True).passes == 24 and kind(1.0).passes == 20
    assert kind(0.3, sampler="flow_heun").passes == 11, "two lines a step, but one for the last"
    assert kind(0.29, guided=True, guidance=4.0, skip=SkipGuidance(2.0, 0.2, 0.8)).passes == 2 * 6 + 2


def test_a_source_costs_its_encode_and_the_lines_that_run():
    books = backlog()
    plain, edit = (kind_of(job(one)) for one in (request(steps=20), edited(request(steps=20), 0.6)))
    assert books.image(plain) == pytest.approx(0.1 * (20 + 2)) and books.image(edit) == pytest.approx(0.1 * (12 + 3))
    for _ in range(100):
        books.hear(Tick("fake", "source", 2, 2, 0, 4, 0.6, 2, 0, 32, 32))
    assert books.image(edit) == pytest.approx(0.1 * (12 + 2) + 0.3, rel=0.01)
    assert books.image(plain) == pytest.approx(0.1 * (20 + 2))


def test_seconds_are_of_images_by_tenant():
    books = backlog(a=(1.0, 3), b=(1.0, 2))
    assert books.tenants() == pytest.approx({"a": 3.0, "b": 2.0})
    assert (books.seconds, books.images) == (pytest.approx(5.0), 5)
    first, second = books.jobs.values()
    answer(books, first, 2)
    answer(books, second, 2)
    assert books.tenants() == pytest.approx({"a": 1.0}) and books.weights == {"a": 1.0}
    answer(books, first, 1)
    assert books.images == 1, "an image that is answered twice counts once"


def test_alone_the_wait_is_all_that_is_ahead():
    books = backlog(a=(1.0, 7))
    assert books.wait("a", 1.0, 7.0) == pytest.approx(7.0)


def test_a_flood_of_another_tenant_makes_nobody_wait_for_all_of_it():
    books = backlog(flood=(1.0, 1_000), small=(1.0, 3))
    assert books.wait("new", 1.0, 0.0) == 0.0
    assert books.wait("small", 1.0, 3.0) == pytest.approx(6.0)
    assert books.wait("small", 3.0, 3.0) == pytest.approx(4.0)
    assert books.wait("flood", 1.0, 1_000.0) == pytest.approx(1_003.0)


def test_shorter_and_equal_images_of_the_same_tenant_go_first():
    books = backlog(a=(1.0, 2), b=(1.0, 5))
    books.add(of("a", 98, 3))
    assert books.before(kind_of(of("a", 4))) == 0.0
    assert books.before(kind_of(of("a"))) == pytest.approx(2.0)
    assert books.before(kind_of(of("a", 200))) == pytest.approx(2.0 + 3 * 10.0)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 5)), max_size=30), st.integers(0, 5)
)
def test_books_in_any_order_end_empty(moves: list[tuple[str, int, int]], answered: int):
    books = backlog()
    for name, passes, images in moves:
        books.add(of(name, passes, images, weight=2.0))
    assert books.images == sum(images for _, _, images in moves)
    assert books.seconds == pytest.approx(
        sum(books.image(kind_of(of("", passes))) * images for _, passes, images in moves)
    )
    for some in sorted(books.jobs.values(), key=kind_of):
        answer(books, some, min(answered, some.images_left))
        books.end(some.request.id)
    assert (books.images, books.seconds, books.weights, books.jobs) == (0, 0, {}, {})


def test_best_state_and_merged_rates():
    loading, failed = ModelState("m", "loading"), ModelState("m", "failed", "bad file")
    ready = ModelState("m", "ready", seconds=2.0, device_bytes=7, rates={"32x32": 1.0})
    assert best([failed, loading, ready]) is ready
    assert best([failed, loading]) is loading
    assert best([Backlog().state("m")]) == ModelState("m", "absent")
    later = merge(ready, ModelState("m", "ready", rates={"64x64": 4.0}))
    assert later == replace(ready, rates={"32x32": 1.0, "64x64": 4.0})
    assert merge(ready, failed) == replace(failed, rates={"32x32": 1.0}) and merge(Backlog().state("m"), ready) == ready


def test_a_process_that_is_dead_leaves_jobs_and_rates_and_nothing_else():
    books = backlog(a=(1.0, 2))
    books.hear(Memory({"weights": 5}))
    books.hear(Tick("fake", "denoise", 2, 2, 0, 4, 0.1, 2, 0))
    assert (books.running, books.images_of("fake"), books.proved("fake")) == (2, (2, 2), True)
    assert books.forget() == [Memory({"weights": 0}), ModelState("fake", "absent")]
    assert (books.running, books.images_of("fake"), books.proved("fake")) == (0, (0, 2), False)
    assert books.state("fake") == ModelState("fake", "absent") and books.forget()[1:] == []
    assert books.seconds == pytest.approx(2.0) and books.rates.measured("fake")


def test_only_what_is_left_of_a_job_moves_to_other_books():
    """It has answers for some of its images; those are neither counted nor taken off again."""
    first, second = backlog(), backlog()
    some = of("a", images=3)
    first.add(some)
    answer(first, some, 2)
    first.end(some.request.id)
    second.add(some)
    assert (first.images, first.weights, second.images) == (0, {}, 1)
    answer(second, some, 2)
    assert second.images == 1, "what was answered before is no news"
    second.hear(Result(some.request.id, 2, 2, np.zeros(0), Timings(0, 0, 0, 0, 0, 0)))
    assert second.images == 0 and some.future.done()


def refined(text: str = "a cat", switch_at: float = 0.5, model: str = "other", **changes: object) -> Job:
    """Six of eight lines in the first model, two in the other."""
    return job(changed(request(text, **{"steps": 8, **changes}), refiner=Refiner(model, switch_at)))


def test_a_refined_image_costs_its_passes_and_an_encode_in_each_model_and_one_decode():
    kind = kind_of(refined(guided=True))
    first = request().recipe.key
    assert kind.legs == ((first, 12), (first._replace(model="other"), 4))
    books = Backlog()
    for model, rate in (("fake", 0.1), ("other", 0.4)):
        books.hear(ModelState(model, "ready", rates={"32x32": rate}))
    assert books.image(kind) == pytest.approx(12 * 0.1 + 0.1 + 4 * 0.4 + 0.4 + 0.4)
    edit = kind_of(job(edited(changed(request(steps=8), refiner=Refiner("other", 0.5)), 0.75)))
    assert books.image(edit) == pytest.approx(4 * 0.1 + 0.1 + 0.1 + 2 * 0.4 + 0.4 + 0.4), "the source is the first's"
    books.hear(Tick("other", "decode", 1, 1, 0, 4, 40.0, 1, 0, 32, 32))
    assert books.image(kind) > books.image(kind_of(job(steps=8, guided=True))) + 4 * 0.4


def test_a_leg_without_lines_costs_nothing():
    late = edited(changed(request(steps=8), refiner=Refiner("other", 0.5)), 0.25)
    kind = kind_of(job(late))
    assert kind.legs == ((request().recipe.key._replace(model="other"), 2),)
    assert kind_of(refined(switch_at=1.0)).legs == ((request().recipe.key, 8),)


def test_a_refined_image_is_one_image_of_the_model_that_draws_it_first():
    books = backlog()
    books.add(some := refined(seeds=(1, 2)))
    books.hear(Tick("other", "denoise", 2, 2, 0, 4, 0.1, 2, 0))
    books.hear(Tick("fake", "denoise", 1, 1, 0, 4, 0.1, 2, 0))
    assert (books.images, books.images_of("fake"), books.images_of("other")) == (2, (1, 2), (0, 0))
    answer(books, some, 2)
    books.end(some.request.id)
    assert (books.images, books.seconds, books.weights, books.images_of("fake")) == (0, 0, {}, (0, 0))


def test_the_worst_of_two_models_is_the_one_that_failed():
    books = Backlog()
    for model, state in (("fake", "ready"), ("other", "failed")):
        books.hear(ModelState(model, state))
    assert books.worst(["fake"]).state == "ready"
    assert books.worst(["fake", "none"]).state == "absent"
    assert books.worst(["fake", "other", "none"]).state == "failed"
    other = Backlog()
    other.hear(ModelState("fake", "ready"))
    assert choose([books, other], ("fake",), 60.0) == 0 and choose([books, other], ("fake", "other"), 60.0) == 1
