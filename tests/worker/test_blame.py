"""Who is guilty of a death: by what the process computed, how often it was suspect, and who was beside it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest

from app.errors import LoadError
from app.jobs.job import Job
from app.report import Place
from app.request import ClassLabel, ImageSpec, Prompt, Refiner
from app.worker import supervisor
from app.worker.supervisor import LOADS, Blame
from tests.parts.requests import changed
from tests.parts.supervising import job, request
from tests.parts.waiting import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=made))
    return made


def death(books: Blame, *computed: tuple[Job, int, int], loading: set[str] | None = None) -> None:
    """A process dies that computed these jobs, with the index and the line of each row."""
    places: list[Place] = [(one.request.id, index, line) for one, index, line in computed]
    books.judge(places, loading or set(), {one.request.id: one for one, *_ in computed})


def crashed(books: Blame, one: Job) -> bool:
    error = books.error(one.request)
    assert error is None or (error.code, error.retry_after) == ("crashed", None)
    return error is not None


def condemned(text: str = "boom", **changes: object) -> tuple[Blame, Job]:
    """Books of a job that was alone at two deaths."""
    books, poison = Blame(), job(text, **changes)
    for _ in range(2):
        death(books, (poison, 0, 1))
    return books, poison


def test_at_the_first_death_all_that_was_computed_is_suspect_and_nobody_guilty() -> None:
    books, one, two, beside = Blame(), job("one", seeds=(1, 2)), job("two"), job("three")
    jobs = {each.request.id: each for each in (one, two, beside)}
    books.judge([(one.request.id, 1, 3), (two.request.id, 0, -1)], set(), jobs)
    assert (one.apart, two.apart, beside.apart) == ({1: 3}, {0: -1}, {})
    assert not any(crashed(books, each) for each in (one, two, beside))


def test_one_that_was_suspect_and_is_alone_at_another_death_is_guilty() -> None:
    books, poison, bystander = Blame(), job("boom"), job("calm")
    death(books, (poison, 0, 2), (bystander, 0, 5))
    death(books, (poison, 0, 0))
    assert crashed(books, poison) and not crashed(books, bystander)


def test_one_that_got_past_the_line_where_it_was_suspect_is_suspect_anew() -> None:
    books, one = Blame(), job("one")
    for line in (-1, 0, 3, 4):
        death(books, (one, 0, line))
        assert not crashed(books, one) and one.apart == {0: line}
    death(books, (one, 0, 4))
    assert crashed(books, one)


def test_each_image_has_its_own_line() -> None:
    books, one = Blame(), job("one", seeds=(1, 2))
    death(books, (one, 0, 5))
    death(books, (one, 1, 3))
    assert not crashed(books, one)
    death(books, (one, 1, 3))
    assert crashed(books, one)


def test_alone_at_a_first_death_is_no_guilt() -> None:
    books, alone = Blame(), job("calm")
    death(books, (alone, 0, 2))
    assert not crashed(books, alone) and alone.apart == {0: 2}


@pytest.mark.parametrize("deaths", [2, 5, 50])
def test_in_company_nobody_is_guilty_however_many_deaths_there_are(deaths: int) -> None:
    books, one, two = Blame(), job("one"), job("two")
    for line in range(deaths):
        death(books, (one, 0, line), (two, 0, line))
    assert not crashed(books, one) and not crashed(books, two)


def test_one_that_was_nowhere_before_is_not_guilty_of_what_others_did() -> None:
    books, poison, late = Blame(), job("boom"), job("late")
    death(books, (poison, 0, 2))
    death(books, (late, 0, 0))
    assert not crashed(books, late) and not crashed(books, poison)


def test_alone_beside_a_load_is_no_proof() -> None:
    """The thread that loads may have ended the process as well."""
    books, one = Blame(), job("one")
    for _ in range(LOADS - 1):
        death(books, (one, 0, 2), loading={"other"})
    assert not crashed(books, one)
    death(books, (one, 0, 2))
    assert crashed(books, one)


def test_two_images_of_one_request_are_one_request() -> None:
    books, poison = Blame(), job("boom", seeds=(1, 2))
    for _ in range(2):
        death(books, (poison, 0, 1), (poison, 1, 1))
    assert crashed(books, poison)


def test_the_latest_line_of_an_image_is_the_one_up_to_which_it_is_apart() -> None:
    books, one, two = Blame(), job("one", seeds=(1, 2)), job("two")
    for line, index in ((-1, 0), (4, 0), (2, 0), (1, 1)):
        death(books, (one, index, line), (two, 0, 0))
    assert one.apart == {0: 4, 1: 1}


def test_an_idle_death_and_rows_that_are_answered_accuse_nobody() -> None:
    books, answered, waiting = Blame(), job("answered"), job("waiting")
    jobs = {waiting.request.id: waiting}
    for places in ([], [(answered.request.id, 0, 3)]):
        for _ in range(3):
            books.judge(places, set(), jobs)
    assert not crashed(books, answered) and not crashed(books, waiting) and waiting.apart == {}
    death(books, (waiting, 0, 1))
    books.judge([(answered.request.id, 0, 3), (waiting.request.id, 0, 1)], set(), jobs)
    assert crashed(books, waiting), "a row that is answered is no company"


def test_twins_share_recipe_and_conditions_and_nothing_else_counts() -> None:
    books, poison = condemned(seeds=(1, 2))
    first = poison.request
    images = tuple(replace(spec, seed=5) for spec in first.images)
    again = changed(first, id="new", deadline=9.0, images=images, tenant="other key", weight=2.0, priority=2)
    assert books.error(again)
    for other in (
        changed(first, steps=5),
        changed(first, width=64),
        changed(first, model="other"),
        changed(first, guidance=0.5),
        replace(first, images=first.images[:1]),
        replace(first, images=first.images[::-1] + first.images[:1]),
        replace(first, images=(ImageSpec(Prompt("boom", "dark"), 1), first.images[1])),
        replace(first, images=(ImageSpec(Prompt("boom", ""), 1), first.images[1])),
        replace(first, images=(ImageSpec(ClassLabel(3), 1), first.images[1])),
    ):
        assert books.error(other) is None, other


def test_a_twin_that_is_suspect_once_does_not_make_another_guilty() -> None:
    books, one, twin = Blame(), job("boom"), job("boom")
    death(books, (one, 0, 2), (twin, 0, 2))
    assert not crashed(books, one)
    death(books, (one, 0, 2))
    assert crashed(books, one) and crashed(books, twin)


def test_after_ten_minutes_it_is_tried_again(clock: Clock) -> None:
    clock.now = 1000.0
    books, poison = condemned()
    clock.now += 599.9
    assert crashed(books, poison)
    clock.now += 0.1
    assert not crashed(books, poison)
    death(books, (poison, 0, 1))
    assert crashed(books, poison), "the same job is suspect still"


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    books = Blame(memory=3)
    poisons = [job(f"boom {number}") for number in range(5)]
    for poison in (*poisons[:3], poisons[0], *poisons[3:]):
        for _ in range(2):
            death(books, (poison, 0, 1))
    assert [crashed(books, poison) for poison in poisons] == [True, False, False, True, True]


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_long_prompt_takes_no_more_memory_than_a_short_one(size: int) -> None:
    books, _ = condemned("x" * size)
    assert len(pickle.dumps(books)) < 1000


def test_models_that_end_processes_are_bounded_too() -> None:
    books = Blame(memory=3)
    for number in range(6):
        for _ in range(LOADS):
            death(books, loading={f"m{number}"})
    assert [books.of(f"m{number}", "64x64") is not None for number in range(6)] == [False] * 3 + [True] * 3


def test_deaths_in_a_row_while_a_model_loads_keep_it_away(clock: Clock) -> None:
    clock.now, books = 1000.0, Blame()
    for _ in range(LOADS - 1):
        death(books, loading={"fake"})
        assert books.of("fake", "64x64") is None
    death(books, loading={"fake"})
    error = books.of("fake", "64x64")
    assert isinstance(error, LoadError) and error.code == "model_load_failed" and "fake" in error.message
    assert books.error(request()) is not None and books.error(request(model="other")) is None
    clock.now += 600.0
    assert books.of("fake", "64x64") is None
    death(books, loading={"fake"})
    assert books.of("fake", "64x64") is None, "the count begins anew"


def test_a_model_that_was_measured_once_begins_anew() -> None:
    books = Blame()
    for _ in range(LOADS):
        for _ in range(LOADS - 1):
            death(books, loading={"fake", "other"})
        books.works("fake")
        books.works("nobody")
    assert books.of("fake", "64x64") is None and books.of("other", "64x64")


def test_what_another_model_does_does_not_count() -> None:
    books = Blame()
    for model in ("fake", "other") * (LOADS - 1):
        death(books, loading={model})
    assert books.of("fake", "64x64") is None and books.of("other", "64x64") is None


def test_a_size_that_ends_processes_when_it_is_measured_is_left_and_other_sizes_are_not() -> None:
    """Each process measures another size before it comes to that one."""
    books, wide, usual = Blame(), request(width=2048, height=1024), request()
    for _ in range(LOADS):
        assert books.error(wide) is None
        books.works("fake", usual.recipe.key.size)
        death(books, loading={"fake 2048x1024"})
    error = books.error(wide)
    assert error and (error.code, error.retry_after) == ("crashed", None) and "2048x1024" in error.message
    assert books.error(usual) is None and books.error(request(model="other", width=2048, height=1024)) is None
    books.works("fake", "2048x1024")
    assert books.error(wide) is None


def test_who_asks_for_the_same_as_a_suspect_is_suspect_until_one_is_answered() -> None:
    books, one, twin, other = Blame(memory=3), job("one", seeds=(1, 2)), request("one", seeds=(3, 4)), request("other")
    assert books.lines(twin) == {}
    death(books, (one, 1, 4))
    assert (books.lines(twin), books.lines(other)) == ({1: 4}, {})
    books.answered(other)
    assert books.lines(twin) == {1: 4}
    books.answered(twin)
    assert books.lines(twin) == {}
    death(books, (one, 1, 4), *((job(f"more {number}"), 0, 0) for number in range(3)))
    assert books.lines(twin) == {}, "the oldest goes first"


def test_a_refiner_that_ends_processes_bars_the_requests_for_it() -> None:
    books, plain = Blame(), job("one")
    both = job(changed(request("one"), refiner=Refiner("other", 0.5)))
    for _ in range(LOADS):
        assert books.error(both.request) is None
        death(books, loading={"other"})
    assert isinstance(books.error(both.request), LoadError) and books.error(plain.request) is None


def test_one_that_dies_twice_where_its_second_encode_stands_is_guilty() -> None:
    """Its line there is that of the first step after it."""
    books, one = Blame(), job(changed(request("one", steps=8), refiner=Refiner("other", 0.5)))
    death(books, (one, 0, 6))
    assert one.apart == {0: 6} and not crashed(books, one)
    death(books, (one, 0, 6))
    assert crashed(books, one)
