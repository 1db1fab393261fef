"""The books of one worker in device seconds: whose, how long, what goes first; empty when all is answered."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.jobs.job import Job
from app.report import ModelState, Result, Timings
from app.worker.admission import Backlog, Kind, kind_of
from tests.parts.supervising import job


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
