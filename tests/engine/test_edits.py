"""Rows that start from a picture, with a mask and without, beside rows that do not: on real networks."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.engine.row import Row, rows_of
from app.errors import Cancelled, InvalidValue, OutOfMemory
from app.pool.policy import PHASES
from app.pool.pool import Pool
from app.report import Preview, Progress, Tick
from app.request import ImageSpec, Prompt, Request, SkipGuidance
from tests.engine.test_mixed import ask as any_request
from tests.engine.test_mixed import cancelled, run_mixed
from tests.families.plain import ask
from tests.parts.close import SAME, apart, close
from tests.parts.edits import edited, half_mask, picture
from tests.parts.engine import Bench, FakeCosts
from tests.parts.requests import changed

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")


def draw(
    name: str,
    steps: int = 10,
    guidance: float = 0.0,
    strength: float | None = None,
    masked: bool = False,
    sampler: str = "flow_euler",
    seed: int = 1,
) -> Request:
    """An image of tiny-sd3, 32x32; with a strength it starts from the picture of its seed."""
    plain = ask("tiny-sd3", Prompt("red"), steps=steps, guidance=guidance, sampler=sampler, name=name, seed=seed)
    return plain if strength is None else edited(plain, strength, masked, seed)


SEVEN = [
    (draw("plain guided", 14, 4.0), 14),
    (draw("plain", 9), 9),
    (draw("late guided", 28, 4.0, 0.6), 17),
    (draw("late", 28, strength=0.3), 9),
    (draw("masked guided", 20, 4.0, 0.75, True), 15),
    (draw("masked from noise", 8, strength=1.0, masked=True), 8),
    (draw("masked heun", 10, 2.0, 0.6, True, "flow_heun"), 11),
]
"""Requests, and how many lines of each run."""


@pytest.fixture
def family(tiny_pool: Pool) -> Any:
    return tiny_pool.family("tiny-sd3")


@contextmanager
def encoding(family: Any, act: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """`act` sees the pictures, [B, 3, H, W], of each forward of the VAE's encoder before it runs."""
    hook = family.vae.encoder.register_forward_pre_hook(lambda module, inputs: act(inputs[0]))
    yield
    hook.remove()


def sources(bench: Bench) -> list[Tick]:
    return [tick for tick in bench.of(Tick) if tick.phase == "source"]


def is_empty(bench: Bench, pool: Pool) -> bool:
    """Whether nothing is left of any row: no slot, no place of a mask, no lease."""
    slots = bench.engine.runner.slots.by_key.values()
    idle = all(one.idle and (one.masks.place == -1).all() for one in slots)
    leases = sum(one.leases for name in pool.cards for phase in PHASES for one in pool.components(name, phase))
    return idle and bench.engine.batcher.running == bench.engine.batcher.waiting == leases == 0


def test_seven_of_every_kind_share_their_forwards(tiny_pool: Pool) -> None:
    bench = Bench(tiny_pool).run([changed(request, progress=True) for request, _ in SEVEN])
    assert not bench.failures and max(tick.rows for tick in bench.forwards) == len(SEVEN)
    assert len(bench.forwards) <= max(lines for _, lines in SEVEN) + 4
    for request, lines in SEVEN:
        result = bench.results[request.id, 0]
        told = [report for report in bench.of(Progress) if report.request_id == request.id]
        assert result.timings.steps == len(told) == told[-1].steps == lines, "only lines that run count"
        close(result.latents, Bench(tiny_pool).run([request]).results[request.id, 0].latents, SAME, of=request.id)


def test_a_row_that_starts_late_joins_the_forward_that_runs(tiny_pool: Pool) -> None:
    bench = Bench(tiny_pool)
    bench.engine.submit(draw("first", 30))
    bench.turn(8)
    bench.run([draw("second", 30, 4.0, 0.5, True)])
    assert len(bench.forwards) == 30 and sum(tick.rows == 2 for tick in bench.forwards) == 15


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("change", ["strength", "mask", "source", "seed", "plain"])
def test_the_comparison_would_see_a_wrong_start(tiny_pool: Pool, change: str, guidance: float) -> None:
    """The control of every comparison with itself alone."""
    request = draw("one", 10, guidance, 0.6, True)
    others = {
        "strength": draw("one", 10, guidance, 0.7, True),
        "mask": draw("one", 10, guidance, 0.6),
        "source": edited(draw("one", 10, guidance), 0.6, True, seed=2),
        "seed": edited(draw("one", 10, guidance, seed=2), 0.6, True, seed=1),
        "plain": draw("one", 10, guidance),
    }
    mine, other = (Bench(tiny_pool).run([one]).results["one", 0].latents for one in (request, others[change]))
    apart(other, mine, SAME)


def traffic(cards: Mapping[str, Card], count: int, seed: int) -> list[Request]:
    """Random requests of all models, two of three with a picture, half of these with a mask."""
    rng, models, found = random.Random(seed), sorted(cards), []
    for number in range(count):
        card = cards[models[number % len(models)]]
        request = changed(any_request(card, number // len(models), rng), id=f"edit-{number}")
        strength, masked = rng.choice((0.3, 0.6, 0.99, 1.0)), rng.random() < 0.5
        request = edited(request, strength, masked, number % 5) if rng.random() < 0.67 else request
        with contextlib.suppress(InvalidValue):  # no step is left
            card.legs(request.recipe)
            found.append(request)
    return found


@pytest.mark.slow
def test_mixed_traffic_equals_each_request_alone(tiny_pool: Pool) -> None:
    requests = traffic(tiny_pool.cards, 90, seed=3)
    mixed = run_mixed(tiny_pool, requests, seed=1, cancel_every=4)
    assert max(tick.rows for tick in mixed.forwards) >= 4, "the traffic never shared a forward"
    gone = cancelled(mixed)
    assert gone == set(mixed.failures) and is_empty(mixed, tiny_pool)
    ended = [request for request in requests if request.id not in gone]
    assert sum(request.recipe.masked for request in ended) >= 10
    assert {request.recipe.sampler for request in ended if request.source} >= {"ddim", "flow_euler", "flow_heun"}
    for request in ended:
        alone = Bench(tiny_pool).run([request]).results[request.id, 0]
        close(mixed.results[request.id, 0].latents, alone.latents, SAME, of=request.recipe)


@pytest.mark.slow
def test_deterministic_mode_is_bit_equal_alone_and_in_traffic(tiny_pool: Pool) -> None:
    requests = [
        request
        for request in traffic(tiny_pool.cards, 60, seed=4)
        if request.recipe.steps <= 10 and request.recipe.key.width == request.recipe.key.height == 32
    ]
    assert len(requests) > 15
    seen = [run_mixed(tiny_pool, requests, seed=seed, deterministic=True) for seed in (0, 1)]
    for mixed in seen:
        assert max(tick.rows for tick in mixed.forwards) >= 3 and {tick.passes for tick in mixed.forwards} == {8}
    for request in requests:
        alone = Bench(tiny_pool, deterministic=True).run([request]).results[request.id, 0]
        for mixed in seen:
            np.testing.assert_array_equal(mixed.results[request.id, 0].latents, alone.latents)
            np.testing.assert_array_equal(mixed.results[request.id, 0].pixels, alone.pixels)


def test_deterministic_mode_encodes_sources_in_one_width(tiny_pool: Pool, family: Any) -> None:
    widths: list[int] = []
    requests = [draw(f"r{seed}", 4, strength=0.5, masked=seed == 1, seed=seed) for seed in range(3)]
    with encoding(family, lambda pictures: widths.append(len(pictures))):
        together = Bench(tiny_pool, deterministic=True).run(requests).results
        alone = {**Bench(tiny_pool, deterministic=True).run([requests[1]]).results}
    assert set(widths) == {family.card.bucket.decode}
    np.testing.assert_array_equal(together["r1", 0].latents, alone["r1", 0].latents)


def test_a_source_of_many_images_is_encoded_once(tiny_pool: Pool, family: Any) -> None:
    """Of one request and of others with the same picture; what a seed draws from the posterior differs all the same."""
    encoded: list[int] = []
    images = tuple(ImageSpec(Prompt("red"), seed) for seed in range(4))
    one = replace(draw("one", strength=0.6), images=images)
    two = replace(draw("two", strength=0.3, masked=True), images=images)
    with encoding(family, lambda pictures: encoded.append(len(pictures))):
        bench = Bench(tiny_pool).run([one])
        assert encoded == [1] and len(bench.results) == 4
        encoded.clear()
        bench.run([two, edited(draw("other"), 0.6, seed=7)])
        assert sum(encoded) == 2
    for place, name in enumerate(("one", "two")):
        latents = [bench.results[name, index].latents for index in range(4)]
        apart(latents[1], latents[0], SAME)
        seed = replace((one, two)[place], images=images[2:3])
        close(latents[2], Bench(tiny_pool).run([seed]).results[name, 0].latents, SAME)


def test_images_of_one_source_do_not_wait_for_each_other(tiny_pool: Pool) -> None:
    """The VAE takes one picture at a time here, as it does at 1024 x 1024, and the rows that run are in between."""
    costs = FakeCosts()
    bench = Bench(tiny_pool, costs=costs)
    bench.engine.submit(draw("first", 30))
    bench.turn(8)
    for caps in costs.caps.values():
        caps.decode = 1
    bench.run(
        [replace(draw("four", 4, strength=1.0), images=tuple(ImageSpec(Prompt("red"), seed) for seed in range(4)))]
    )
    assert [tick.rows for tick in sources(bench)] == [4] and len(bench.results) == 5


def test_previews_keep_what_the_mask_keeps(tiny_pool: Pool, family: Any) -> None:
    """A preview is of the clean latent, but of the source outside the mask; each of its pixels sees 3 x 3 latents."""
    plain = ask("tiny-sd3", Prompt("red"), steps=10, guidance=4.0, sampler="flow_euler", name="seen", size=(64, 64))
    bench = Bench(tiny_pool).run([changed(edited(plain, 0.6, True), previews=2)])
    with torch.inference_mode():
        last = family.preview(torch.from_numpy(bench.results["seen", 0].latents)[None])[0].numpy()
    new = torch.from_numpy(half_mask(64, 64)[::4, ::4] > 0)
    near = torch.nn.functional.max_pool2d(new[None].float(), 3, 1, 1)[0].numpy().repeat(4, 0).repeat(4, 1) > 0
    assert (~near).mean() > 0.2 and len(bench.of(Preview)) == 2
    for preview in bench.of(Preview):
        away = np.abs(preview.pixels.astype(int) - last).max(axis=-1)
        assert away[~near].max() <= 1 and away[near].max() > 10


def test_a_request_that_is_cancelled_while_its_source_is_encoded(tiny_pool: Pool, family: Any) -> None:
    bench = Bench(tiny_pool)
    requests = [draw(f"r{seed}", 6, strength=0.6, masked=True, seed=seed) for seed in range(3)]
    with encoding(family, lambda pictures: bench.engine.cancel("r1")):
        bench.run(requests)
    assert isinstance(bench.failures["r1"].error, Cancelled) and len(bench.failures) == 1
    assert sorted(bench.results) == [("r0", 0), ("r2", 0)] and is_empty(bench, tiny_pool)
    close(bench.results["r2", 0].latents, Bench(tiny_pool).run([requests[2]]).results["r2", 0].latents, SAME)


@pytest.mark.parametrize("ends", ["answered", "cancelled"])
def test_nothing_of_a_source_stays_until_the_deadline(tiny_pool: Pool, ends: str) -> None:
    """The openai client sends its read timeout of 10 minutes, which is a deadline here."""
    bench, request = Bench(tiny_pool), changed(draw("r", 6, strength=0.6, masked=True), deadline=1e9)

    def kept() -> list[Row]:
        """Rows that have the source or what was encoded of it."""
        rows = [one for one in gc.get_objects() if type(one) is Row and one.request.id == "r"]
        return [row for row in rows if row.request.source or row.posterior is not None]

    bench.engine.submit(request)
    bench.turn(2)
    assert kept()
    if ends == "cancelled":
        bench.engine.cancel("r")
    bench.run()
    assert not kept()


@pytest.mark.parametrize("turns", range(9))
def test_a_request_that_is_cancelled_at_any_time_leaves_nothing(tiny_pool: Pool, turns: int) -> None:
    bench = Bench(tiny_pool)
    gone, stays = draw("gone", 12, 4.0, 0.6, True), draw("stays", 12, 4.0, 0.6, True, seed=2)
    for request in (gone, stays):
        bench.engine.submit(request)
    bench.turn(turns)
    bench.engine.cancel("gone")
    bench.run()
    assert list(bench.failures) == ["gone"] and list(bench.results) == [("stays", 0)] and is_empty(bench, tiny_pool)
    close(bench.results["stays", 0].latents, Bench(tiny_pool).run([stays]).results["stays", 0].latents, SAME)


@contextmanager
def one_picture_breaks_the_encoder(family: Any, seed: int, value: float) -> Iterator[None]:
    """The encoder gives `value` somewhere for the picture of this seed alone."""
    bad = torch.from_numpy(picture(32, 32, seed)).permute(2, 0, 1) / 127.5 - 1

    def spoil(module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for place, row in enumerate(inputs[0]):
            if torch.allclose(row.float(), bad, atol=1e-3):
                output[place, 0, 1, 2] = value
        return output

    hook = family.vae.encoder.register_forward_hook(spoil)
    yield
    hook.remove()


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_source_that_encodes_to_no_numbers_fails_alone(
    tiny_pool: Pool, family: Any, value: float, deterministic: bool
) -> None:
    requests = [draw(f"r{seed}", 4, strength=0.6, masked=seed % 2 == 0, seed=seed) for seed in range(5)]
    right = Bench(tiny_pool, deterministic=deterministic).run(requests).results
    with one_picture_breaks_the_encoder(family, 2, value):
        bench = Bench(tiny_pool, deterministic=deterministic).run([*requests, draw("plain", 4)])
    assert [(name, one.error.code) for name, one in bench.failures.items()] == [("r2", "non_finite_output")]
    assert {name for name, _ in bench.results} == {"r0", "r1", "r3", "r4", "plain"} and is_empty(bench, tiny_pool)
    for key, result in bench.results.items():
        if key != ("plain", 0):
            close(result.latents, right[key].latents, SAME)
            assert not deterministic or (result.latents == right[key].latents).all()


def test_an_encode_out_of_memory_is_halved_and_all_rows_live(tiny_pool: Pool, family: Any) -> None:
    widths: list[int] = []

    def narrow(pictures: torch.Tensor) -> None:
        widths.append(len(pictures))
        if len(pictures) > 1:
            raise torch.OutOfMemoryError("no room")

    requests = [draw(f"r{seed}", 4, strength=0.6, seed=seed) for seed in range(4)]
    with encoding(family, narrow):
        bench = Bench(tiny_pool).run(requests)
    assert len(bench.results) == 4 and not bench.failures
    assert widths == [4, 2, 1, 1, 2, 1, 1] and [tick.out_of_memory for tick in sources(bench)] == [3]


def test_a_source_without_room_of_its_own_is_an_error_of_its_request(tiny_pool: Pool, family: Any) -> None:
    def none(pictures: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no room")

    with encoding(family, none):
        bench = Bench(tiny_pool).run([draw("edit", strength=0.6), draw("plain")])
    assert isinstance(bench.failures["edit"].error, OutOfMemory) and list(bench.results) == [("plain", 0)]
    assert is_empty(bench, tiny_pool)


def test_a_strength_without_a_step_is_answered(tiny_pool: Pool) -> None:
    request = ask("tiny-dit", any_request(tiny_pool.cards["tiny-dit"], 0, random.Random(0)).images[0].condition,
                  steps=4, guidance=0.0, sampler="ddim", name="none", text_length=0)  # fmt: skip
    bench = Bench(tiny_pool).run([edited(request, 0.2), draw("plain")])
    error = bench.failures["none"].error
    assert isinstance(error, InvalidValue) and error.param == "strength" and list(bench.results) == [("plain", 0)]


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun"])
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9, 1.0])
def test_skip_layer_guidance_covers_the_same_steps_of_a_late_table(
    tiny_pool: Pool, sampler: str, strength: float
) -> None:
    """start and stop are shares of all steps, those before the start too; what is skipped counts in the cost."""
    steps, skip, cards = 20, SkipGuidance(2.5, 0.2, 0.65), tiny_pool.cards
    whole = changed(draw("whole", steps, 4.0, sampler=sampler), skip=skip)
    (full,), (late,) = (list(rows_of(one, cards, 0.0, iter(range(9)))) for one in (whole, edited(whole, strength)))
    first = cards["tiny-sd3"].legs(late.request.recipe)["tiny-sd3"].first
    before = first * (2 if sampler == "flow_heun" else 1)
    assert late.lines == full.lines - before
    assert list(late.skipping) == [line - before for line in full.skipping if line >= before]
    assert late.total == 2 * late.lines + len(late.skipping)
