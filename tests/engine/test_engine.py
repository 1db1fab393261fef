"""The engine's promises, on a network of arithmetic: what is asked is answered once, whatever happens beside it."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch

from app.engine import step
from app.engine.costs import Curve
from app.engine.queue import AGE_LIMIT
from app.engine.row import Row
from app.engine.runner import IDLE_KEYS, SlotPool
from app.engine.step import totals
from app.errors import (
    Cancelled,
    CheckpointError,
    DeadlineExceeded,
    EngineError,
    InvalidValue,
    ModelNotFound,
    OutOfMemory,
)
from app.families.base import Conditions
from app.report import Announce, ModelState, Preview, Progress, Tick
from app.request import ImageSpec, Key, Prompt
from tests.parts.close import FORWARD, apart, close, furthest
from tests.parts.engine import NOT_A_NUMBER, POISON, Bench, FakeCosts, FakeFamily, FakePool, card, request
from tests.parts.requests import passes
from tests.parts.waiting import eventually


@pytest.fixture
def pool() -> FakePool:
    return FakePool(FakeFamily(card()), FakeFamily(card("second")))


SEVEN = [(1, False), (2, True), (4, False), (10, True), (20, False), (28, True), (28, True)]


def test_seven_requests_take_the_forwards_of_the_longest(pool: FakePool) -> None:
    requests = [request(f"r{n}", steps=steps, guided=guided) for n, (steps, guided) in enumerate(SEVEN)]
    bench = Bench(pool).run(requests)
    assert len(bench.results) == 7
    assert len(bench.forwards) <= 28 + 4
    assert max(tick.rows for tick in bench.forwards) == 7


def test_a_short_request_passes_eight_long_ones_at_the_cap(pool: FakePool) -> None:
    bench = Bench(pool, costs=FakeCosts(passes=8))
    for number in range(8):
        bench.engine.submit(request(f"long{number}", steps=50, guided=False))
    bench.turn(12)
    bench.engine.submit(request("short", steps=4, guided=False, progress=True))
    before = len(bench.forwards)
    while ("short", 0) not in bench.results:
        bench.turn()
    assert len(bench.forwards) - before - 4 <= 2
    assert [each.step for each in bench.of(Progress)] == [1, 2, 3, 4]


def test_what_shares_the_batch_does_not_change_a_row(pool: FakePool) -> None:
    requests = [
        request(
            f"r{n}", steps=1 + n * 3, sampler=("flow_euler", "flow_heun", "flow_dpmpp_2m")[n % 3], guided=n % 2 == 0
        )
        for n in range(8)
    ]
    together = Bench(pool, costs=FakeCosts(passes=64)).run(requests).results
    for each in requests:
        alone = Bench(pool).run([each]).results[each.id, 0]
        close(together[each.id, 0].latents, alone.latents, FORWARD, furthest)
        other = together["r0" if each.id != "r0" else "r1", 0]
        apart(other.latents, alone.latents, FORWARD, furthest, of="another row:")


def test_images_of_one_request_are_rows_with_their_own_seeds(pool: FakePool) -> None:
    images = tuple(ImageSpec(Prompt("a"), 40 + index) for index in range(3))
    bench = Bench(pool).run([request("three", images=images)])
    assert [bench.results["three", index].seed for index in range(3)] == [40, 41, 42]
    alone = Bench(pool).run([request("one", images=images[2:])]).results["one", 0]
    close(bench.results["three", 2].latents, alone.latents, FORWARD, furthest)


def test_a_row_that_is_not_finite_fails_alone(pool: FakePool) -> None:
    bad = request("bad", images=(ImageSpec(NOT_A_NUMBER, 1),))
    bench = Bench(pool).run([request("good"), bad, request("fine")])
    assert bench.failures["bad"].error.code == "non_finite_output"
    assert {name for name, _ in bench.results} == {"good", "fine"}
    assert pool.leases == 0


def test_a_poison_prompt_fails_alone(pool: FakePool) -> None:
    bad = request("bad", images=(ImageSpec(POISON, 1),))
    bench = Bench(pool).run([*(request(f"r{n}") for n in range(5)), bad])
    assert isinstance(bench.failures["bad"].error, EngineError)
    assert len(bench.results) == 5
    assert pool.leases == 0


def test_a_step_that_raises_while_it_writes_is_replayed_from_where_it_started(
    pool: FakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Bench(pool).run([request("a", sampler="flow_dpmpp_2m"), request("b")]).results
    calls = 0

    def sums(latents: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no room for the sums")
        return totals(latents)

    monkeypatch.setattr(step, "totals", sums)
    bench = Bench(pool).run([request("a", sampler="flow_dpmpp_2m"), request("b")])
    assert calls > 3 and not bench.failures
    for name, result in bench.results.items():
        close(result.latents, plain[name].latents, FORWARD, furthest)


def by_forwards(pool: FakePool) -> Bench:
    """A bench on a clock that counts forwards, of two passes, and a rate that says so."""
    made: list[Bench] = []
    costs = FakeCosts(passes=2, rate=1.0)
    made.append(Bench(pool, costs=costs, clock=lambda: float(len(made[0].forwards)) if made else 0.0))
    return made[0]


def test_what_a_row_waits_after_its_encode_is_its_queue(pool: FakePool) -> None:
    """Both are encoded at once, and a forward holds one of them."""
    bench = by_forwards(pool)
    bench.run([request("first", steps=5), request("second", steps=8)])
    first, second = (bench.results[name, 0].timings for name in ("first", "second"))
    assert (first.queue, first.encode, first.denoise) == (0, 0, 5)
    assert (second.queue, second.encode, second.denoise) == (5, 0, 8)
    assert [report.rows for report in bench.of(Tick) if report.phase == "encode"] == [2]


def test_a_long_row_ends_within_its_age_limit_under_endless_short_arrivals(pool: FakePool) -> None:
    bench = by_forwards(pool)
    bench.engine.submit(request("long", steps=20, guided=False))
    number = 0
    while ("long", 0) not in bench.results:
        assert len(bench.forwards) < 400, "the long request starves"
        if bench.engine.batcher.waiting < 4:
            bench.engine.submit(request(f"short{number}", steps=4, guided=False))
            number += 1
        bench.turn()
    assert len(bench.forwards) <= (AGE_LIMIT + 1) * 20 + 2
    assert number > 20


class Fussy(FakeFamily):
    """Raises in a forward that holds the unlucky condition, or that is wider than it can hold."""

    unlucky = float("inf")
    widest = 1000

    def denoise(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if len(x) > self.widest:
            raise torch.OutOfMemoryError("no room")
        if (conditions["code"] == self.unlucky).any():
            raise ValueError("unlucky")
        return super().denoise(x, t, conditions)


def test_a_step_that_raises_is_replayed_and_only_its_row_fails() -> None:
    family = Fussy(card())
    requests = [request(f"r{n}", guided=False, sampler="flow_heun", steps=5) for n in range(6)]
    plain = Bench(FakePool(FakeFamily(card()))).run(requests).results
    family.unlucky = float(family.encode(passes([Prompt("r3")]), 24)["code"])
    bench = Bench(FakePool(family)).run(requests)
    assert list(bench.failures) == ["r3"]
    for name, index in bench.results:
        close(bench.results[name, index].latents, plain[name, index].latents, FORWARD, furthest)
    assert len(bench.results) == 5


def test_a_replayed_stochastic_step_sees_the_same_noise() -> None:
    facts = {"schedule": {"kind": "diffusion"}, "defaults": {**card().defaults.model_dump(), "sampler": "ddpm"}}
    family = Fussy(card(**facts))
    requests = [request(f"r{n}", guided=False, sampler="ddpm", steps=10) for n in range(4)]
    plain = Bench(FakePool(FakeFamily(card(**facts)))).run(requests).results
    family.unlucky = float(family.encode(passes([Prompt("r0")]), 24)["code"])
    bench = Bench(FakePool(family)).run(requests)
    for name, index in bench.results:
        close(bench.results[name, index].latents, plain[name, index].latents, FORWARD, furthest)
    assert len(bench.results) == 3


def test_a_step_out_of_memory_is_split_and_all_rows_live() -> None:
    family = Fussy(card())
    family.widest = 3
    bench = Bench(FakePool(family)).run([request(f"r{n}") for n in range(6)])
    assert len(bench.results) == 6 and not bench.failures


def test_a_row_that_does_not_fit_alone_says_so() -> None:
    family = Fussy(card())
    family.widest = 1
    bench = Bench(FakePool(family)).run([request("wide"), request("narrow", guided=False)])
    assert isinstance(bench.failures["wide"].error, OutOfMemory)
    assert ("narrow", 0) in bench.results


def test_a_cancelled_request_leaves_at_the_next_step(pool: FakePool) -> None:
    bench = Bench(pool)
    bench.engine.submit(request("long", steps=50))
    bench.engine.submit(request("other", steps=50))
    bench.turn(10)
    assert bench.forwards[-1].rows == 2
    bench.engine.cancel("long")
    bench.engine.cancel("never seen")
    bench.turn()
    assert isinstance(bench.failures["long"].error, Cancelled)
    assert bench.forwards[-1].rows == 1
    bench.run()
    assert set(bench.results) == {("other", 0)}
    assert pool.leases == 0


def test_one_failing_image_takes_its_request_and_no_other(pool: FakePool) -> None:
    images = (ImageSpec(Prompt("fine"), 1), ImageSpec(NOT_A_NUMBER, 2))
    bench = Bench(pool).run([request("pair", images=images), request("good")])
    assert list(bench.failures) == ["pair"]
    assert ("good", 0) in bench.results
    assert pool.leases == 0


def test_a_deadline_that_passes_ends_the_request(pool: FakePool) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    bench = Bench(pool, clock=clock).run([request("late", steps=50, deadline=0.5), request("free", steps=50)])
    assert isinstance(bench.failures["late"].error, DeadlineExceeded)
    assert ("free", 0) in bench.results


def test_previews_are_the_predicted_clean_latent_evenly_spread(pool: FakePool) -> None:
    bench = Bench(pool).run([request("seen", steps=8, previews=3)])
    previews = bench.of(Preview)
    assert [each.partial for each in previews] == [0, 1, 2]
    assert all(each.pixels.dtype == np.uint8 for each in previews)
    assert not np.array_equal(previews[0].pixels, previews[2].pixels)
    assert len(Bench(pool).run([request("one", steps=1, previews=3)]).of(Preview)) == 0


def test_models_share_the_device_and_an_absent_one_waits(pool: FakePool) -> None:
    pool.present = {"fake"}
    bench = Bench(pool).run([request("a"), request("b", model="second")])
    assert set(bench.results) == {("a", 0)}
    pool.present.add("second")
    bench.run()
    assert set(bench.results) == {("a", 0), ("b", 0)}


def test_a_model_that_cannot_load_fails_its_requests_with_the_reason(pool: FakePool) -> None:
    pool.present = {"fake"}
    bench = Bench(pool).run([request("a", model="second"), request("b")])
    pool.errors["second"] = CheckpointError("vae: truncated")
    pool.states = [ModelState("second", "failed", "vae: truncated")]
    bench.run([request("c", model="second")])
    assert {name: failure.error.message for name, failure in bench.failures.items()} == {
        "a": "vae: truncated",
        "c": "vae: truncated",
    }
    assert set(bench.results) == {("b", 0)}


def test_a_bad_request_that_came_this_far_is_answered(pool: FakePool) -> None:
    bench = Bench(pool).run([request("who", model="nobody"), request("how", sampler="ddim"), request("good")])
    assert isinstance(bench.failures["who"].error, ModelNotFound)
    assert isinstance(bench.failures["how"].error, InvalidValue)
    assert ("good", 0) in bench.results


def test_run_goes_on_until_it_is_stopped_and_says_when_it_may_be_silent(pool: FakePool) -> None:
    bench = Bench(pool)
    thread = threading.Thread(target=bench.engine.run)
    thread.start()
    bench.engine.submit(request("last", steps=20))
    eventually(lambda: ("last", 0) in bench.results)
    bench.engine.stop()
    thread.join(30)
    assert not thread.is_alive() and not bench.failures
    phases = [each.phase for each in bench.reports if isinstance(each, Announce)]
    assert {"profile", "encode", "denoise", "decode"} <= set(phases)

    bench = Bench(pool)
    bench.engine.submit(request("open", steps=20))
    bench.turn(3)
    bench.engine.stop()
    bench.engine.run()
    assert bench.failures["open"].error.code == "shutting_down"


def test_equal_prompts_are_encoded_once(pool: FakePool) -> None:
    same = tuple(ImageSpec(Prompt("same"), seed) for seed in range(4))
    bench = Bench(pool)
    bench.run([request("a", images=same), request("b", images=same)])
    assert pool.families["fake"].encoded == [2], "the prompt and the empty one, in one batch"


def test_a_model_whose_first_forward_fails_takes_its_own_requests_only(pool: FakePool) -> None:
    class Broken(FakeFamily):
        def encode(self, *_: object, **__: object) -> Conditions:
            raise KeyError("broken")

    pool = FakePool(FakeFamily(card()), Broken(card("second")))
    bench = Bench(pool, costs=FakeCosts()).run([request("a", model="second"), request("b")])
    assert isinstance(bench.failures["a"].error, EngineError)
    assert ("b", 0) in bench.results and pool.leases == 0


def test_a_ready_model_whose_first_forward_fails_is_told_as_failed(pool: FakePool) -> None:
    class Refusing(FakeCosts):
        def stored(self, family: object, key: Key) -> None:
            return None

        def measure(self, family: object, key: Key) -> None:
            raise ValueError("no")

    pool.states = [ModelState("fake", "ready")]
    bench = Bench(pool, costs=Refusing()).run()
    (state,) = [each for each in bench.reports if isinstance(each, ModelState)]
    assert state.state == "failed" and state.detail


def test_a_failed_measurement_of_one_size_leaves_the_others(pool: FakePool) -> None:
    class Picky(FakeCosts):
        def stored(self, family: object, key: Key) -> Curve | None:
            return None if key.width == 64 else super().stored(family, key)

        def measure(self, family: object, key: Key) -> None:
            raise torch.OutOfMemoryError("no room")

    bench = Bench(pool, costs=Picky()).run([request("small"), request("large", width=64)])
    assert list(bench.failures) == ["large"] and ("small", 0) in bench.results
    assert isinstance(bench.failures["large"].error, OutOfMemory)
    assert [(tick.rows, tick.width) for tick in bench.forwards if tick.out_of_memory] == [(0, 64)]


def test_a_phase_whose_parts_left_in_that_moment_is_no_work(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"encode": 3, "decode": 3}
    real = pool.lease

    def lease(components: list[Any]) -> bool:
        for _, phase in components:
            if refused.get(phase):
                refused[phase] -= 1
                return False
        return real(components)

    monkeypatch.setattr(pool, "lease", lease)
    bench = Bench(pool).run([request("late")])
    assert ("late", 0) in bench.results and refused == {"encode": 0, "decode": 0}
    assert [tick.phase for tick in bench.of(Tick) if tick.phase != "denoise"] == ["encode", "decode"]


def test_the_slots_of_a_model_that_fails_while_its_rows_run_are_given_back(pool: FakePool) -> None:
    bench = Bench(pool)
    bench.engine.submit(request("open"))
    bench.turn(3)
    assert bench.engine.runner.bytes["slots"]
    pool.errors["fake"] = CheckpointError("the disk is gone")
    pool.states.append(ModelState("fake", "failed"))
    bench.run()
    assert bench.failures["open"].error.code == "model_load_failed" and not bench.engine.runner.bytes["slots"]


def test_slots_of_sizes_that_nobody_uses_are_given_back(pool: FakePool) -> None:
    sizes = [(width, height) for width in (16, 32, 48, 64) for height in (16, 32, 64)]
    requests = [request(f"{w}x{h}", width=w, height=h, steps=2) for w, h in sizes]
    bench = Bench(pool)
    for each in requests:
        bench.run([each])
    assert len(bench.results) == len(sizes)
    assert len(bench.engine.runner.slots.by_key) <= IDLE_KEYS + 1


def test_a_size_without_room_for_its_slots_waits_for_the_others(pool: FakePool) -> None:
    bench = Bench(pool)
    bench.engine.runner.slots = SlotPool(budget=1)
    bench.run([request("a", steps=6), request("b", width=64, steps=2)])
    assert set(bench.results) == {("a", 0), ("b", 0)}
    assert {tick.rows for tick in bench.forwards} == {1}


def test_a_preview_that_fails_leaves_the_image_alone() -> None:
    class Blind(FakeFamily):
        def preview(self, latents: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("no room")

    bench = Bench(FakePool(Blind(card()))).run([request("seen", previews=2)])
    assert ("seen", 0) in bench.results and not bench.of(Preview)


def test_deadlines_of_answered_requests_are_forgotten(pool: FakePool) -> None:
    bench = Bench(pool)
    for number in range(300):
        bench.run([request(f"answered{number}", steps=1, guided=False, deadline=1e12)])
    rows = [one for one in gc.get_objects() if type(one) is Row and one.request.id.startswith("answered")]
    assert len(rows) < 100
