"""Rows with a refiner: two models draw them one after the other, in the forwards of all other rows of each."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete

from app.cards.card import Card
from app.engine.row import Row, rows_of
from app.errors import Cancelled, InvalidValue
from app.families.base import Family
from app.pool.pool import Pool
from app.report import Preview, Progress, Tick
from app.request import ClassLabel, Framing, Prompt, Recipe, Request
from app.samplers.table import valid_samplers
from tests.engine.test_edits import is_empty
from tests.engine.test_mixed import ask as any_request
from tests.engine.test_mixed import cancelled, run_mixed
from tests.families.plain import ask
from tests.parts.close import SAME, apart, close
from tests.parts.edits import edited
from tests.parts.engine import Bench, FakeCosts, load_all
from tests.parts.loras import deltas, surveyed, write_lora
from tests.parts.refined import PAIRS, pairs, refined
from tests.parts.requests import changed
from tests.samplers.oracle import Edit, begin, diffusion_scheduler, flow_scheduler, wide

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLERS = {"tiny-sd3": ("flow_euler", "flow_heun", "flow_dpmpp_2m")}
SAMPLERS["tiny-dit"] = ("ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m")


@pytest.fixture(scope="module")
def cards(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Card]:
    return pairs(tiny, tmp_path_factory.mktemp("refiners"))


@pytest.fixture(scope="module")
def pool(cards: dict[str, Card]) -> Iterator[Pool]:
    pool = load_all(Pool(cards, "cpu", torch.float32))
    yield pool
    pool.close()


def draw(
    name: str,
    steps: int = 10,
    guidance: float = 0.0,
    strength: float | None = None,
    masked: bool = False,
    sampler: str = "flow_euler",
    seed: int = 1,
    model: str = "tiny-sd3",
) -> Request:
    """An image of 32x32; with a strength it starts from the picture of its seed."""
    condition = Prompt("red") if "sd3" in model else ClassLabel(3)
    length = 24 if "sd3" in model else 0
    plain = ask(
        model, condition, steps=steps, guidance=guidance, sampler=sampler, name=name, seed=seed, text_length=length
    )
    return plain if strength is None else edited(plain, strength, masked, seed)


def alone(pool: Pool, request: Request, **bench: Any) -> np.ndarray:
    latents = Bench(pool, **bench).run([request]).results[request.id, 0].latents
    assert latents is not None
    return latents


@contextlib.contextmanager
def float32_noise() -> Iterator[None]:
    """The noise of steps drawn in float32, whatever the latent's format: its bits depend on that."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduling_ddpm, scheduling_euler_ancestral_discrete):
            patch.setattr(
                module,
                "randn_tensor",
                lambda shape, generator, **_: torch.randn(shape, generator=generator, dtype=torch.float32).double(),
            )
        yield


class Drawn:
    """What the generator of a request makes, in the order of diffusers' pipelines, float64 [1, C, h, w].

    edit: where it starts. everywhere: what the mask keeps in every step, whichever of them run; None without a mask.
    """

    def __init__(self, family: Family, request: Request) -> None:
        recipe, source = request.recipe, request.source
        self.dice = torch.Generator().manual_seed(request.images[0].seed)
        self.edit: Edit | None = None
        self.everywhere: Edit | None = None
        shape = (1, *family.latent_shape(recipe.width, recipe.height))
        if source is None:
            self.noise = torch.randn(shape, generator=self.dice).double()
            return
        pixels = torch.frombuffer(bytearray(source.pixels), dtype=torch.uint8).view(1, recipe.height, -1, 3)
        mean, deviation = family.posterior(pixels)[0]
        image = (mean + deviation * torch.randn(shape, generator=self.dice)).double()
        self.noise = torch.randn(shape, generator=self.dice).double()
        self.edit = Edit(image, recipe.strength or 0.0)
        if source.mask is not None:
            torch.randn(shape, generator=self.dice)
            whole = torch.frombuffer(bytearray(source.mask), dtype=torch.uint8).view(1, 1, recipe.height, -1)
            mask = torch.nn.functional.interpolate(whole.double(), size=shape[2:]) > 0
            self.edit, self.everywhere = Edit(image, recipe.strength or 0.0, mask), Edit(image, 1.0, mask)


@torch.inference_mode()
def by_hand(pool: Pool, request: Request, later: int = 0) -> torch.Tensor:
    """The final latent of a request with a refiner: two schedulers of diffusers, the second of which goes on where the
    first has stopped and knows nothing of it, with two networks. later: the switch so many steps too late."""
    recipe, families = request.recipe, [pool.family(name) for name in request.recipe.models]
    assert recipe.refiner is not None and families[0] is not None and families[1] is not None
    drawn, cutoff = Drawn(families[0], request), round(1000 - recipe.refiner.switch_at * 1000)
    order = 2 if "heun" in recipe.sampler else 1
    random = {"generator": drawn.dice} if recipe.sampler in ("ddpm", "euler_ancestral") else {}

    def step(scheduler: Any, network: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out, spread = network(seen, float(t))
        full = torch.cat([out, spread], 1) if recipe.sampler == "ddpm" else out
        result: torch.Tensor = scheduler.step(full, t, x, **random).prev_sample
        return result

    with wide(), float32_noise():
        first, second = (_scheduler(pool.cards[recipe.model], recipe) for _ in range(2))
        timesteps, x, blend = begin(first, drawn.noise, drawn.edit)
        start = len(second.timesteps) - len(timesteps)
        switch = max(start, order * (int((second.timesteps[::order] >= cutoff).sum()) + later))
        for number, t in enumerate(timesteps[: switch - start]):
            x = blend(step(first, _network(families[0], request), x, t), number)
        timesteps, _, blend = begin(second, drawn.noise, drawn.everywhere)
        if hasattr(second, "set_begin_index"):
            second.set_begin_index(switch)
        for number in range(switch, len(timesteps)):
            x = blend(step(second, _network(families[1], request), x, timesteps[number]), number)
    return x[0]


def _scheduler(card: Card, recipe: Recipe) -> Any:
    if card.schedule.kind == "flow":
        return flow_scheduler(card.schedule, recipe.sampler, recipe.steps, 0.0)
    scheduler = diffusion_scheduler(card.schedule, recipe.sampler, card.schedule.prediction)
    scheduler.set_timesteps(recipe.steps)
    return scheduler


def _network(family: Family, request: Request) -> Any:
    recipe, condition = request.recipe, request.images[0].condition
    conditions = family.encode(family.passes(condition, recipe), 24 if family.card.id == recipe.model else 16)
    passes = len(next(iter(conditions.values())))

    def output(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, frac = family.denoise(
            x.float().repeat(passes, 1, 1, 1), torch.full((passes,), t, dtype=torch.float32), conditions
        )
        own = out[:1]
        if passes == 2:
            own = out[1:] + recipe.guidance.scale * (own - out[1:])
        return own.double(), (2 * frac[:1] - 1).double() if frac is not None else own

    return output


@pytest.mark.parametrize("guidance", [3.0, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "sampler"), [(model, one) for model, some in SAMPLERS.items() for one in some])
def test_it_is_two_loops_of_diffusers(pool: Pool, model: str, sampler: str, guidance: float) -> None:
    """Noise goes on from the same generator, solvers with two lines switch between steps, and a multistep solver
    begins anew. A switch one step too early or too late is far away."""
    request = refined(draw("one", 10, guidance, sampler=sampler, model=model), 0.7)
    found = alone(pool, request)
    close(found, by_hand(pool, request), SAME)
    for later in (-1, 1):
        apart(by_hand(pool, request, later), found, SAME, of=later)


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strength", [1.0, 0.7, 0.2])
@pytest.mark.parametrize(("model", "sampler"), [("tiny-sd3", "flow_heun"), ("tiny-dit", "euler_ancestral")])
def test_it_starts_from_a_picture_before_the_switch_or_after_it(
    pool: Pool, model: str, sampler: str, strength: float, masked: bool
) -> None:
    request = refined(draw("one", 10, 3.0, strength, masked, sampler, model=model), 0.6)
    legs = pool.cards[model].legs(request.recipe)
    assert list(legs) == [model, PAIRS[model]][strength == 0.2 :]
    found = alone(pool, request)
    close(found, by_hand(pool, request), SAME)
    for later in (-1, 1) if len(legs) == 2 else ():
        apart(by_hand(pool, request, later), found, SAME, of=later)


def test_where_a_leg_is_empty_one_model_draws(pool: Pool) -> None:
    """The model alone, or the refiner alone with the text length of its card: bit for bit what it draws for others."""
    plain, late = draw("one", 8, 3.0), draw("one", 10, 3.0, 0.2)
    whole = changed(late, model=PAIRS["tiny-sd3"], text_length=16)
    for asked, other in ((refined(plain, 1.0), plain), (refined(late, 0.6), whole)):
        bench = Bench(pool, deterministic=True).run([asked])
        assert {tick.model for tick in bench.of(Tick)} == {other.recipe.model}
        np.testing.assert_array_equal(bench.results["one", 0].latents, alone(pool, other, deterministic=True))
    apart(alone(pool, late), alone(pool, whole), SAME)


SEVEN = [
    refined(draw("guided", 30, 4.0)),
    refined(draw("plain", 30, seed=2)),
    refined(draw("late", 42, 2.0, 0.7, seed=3)),
    refined(draw("masked", 30, 0.0, 1.0, True, seed=4), 0.8),
    refined(draw("multistep", 30, 3.0, sampler="flow_dpmpp_2m"), 0.75),
]
"""Some of them come to the switch at other steps than the rest."""


def test_seven_rows_share_the_forwards_of_both_networks(pool: Pool) -> None:
    """Rows that are refined, before and after their switch, with those of either model that are not."""
    others = [draw("base", 36, 4.0), changed(draw("refiner", 44, 2.0), model=PAIRS["tiny-sd3"], text_length=16)]
    others += [draw("elsewhere", 12, 4.0, sampler="ddim", model="tiny-dit")]
    asked = [changed(one, progress=True) for one in (*SEVEN, *others)]
    bench = Bench(pool, costs=FakeCosts(passes=24)).run(asked)
    assert not bench.failures and is_empty(bench, pool)
    for model, longest in (("tiny-sd3", 36), (PAIRS["tiny-sd3"], 44), ("tiny-dit", 12)):
        forwards = [tick for tick in bench.forwards if tick.model == model]
        assert len(forwards) <= longest + 4, model
        assert model == "tiny-dit" or max(tick.rows for tick in forwards) == 6
    for request in asked:
        result, lines = (
            bench.results[request.id, 0],
            sum(table.lines for table in pool.cards[request.recipe.model].legs(request.recipe).values()),
        )
        told = [(one.step, one.steps) for one in bench.of(Progress) if one.request_id == request.id]
        assert told == [(step, lines) for step in range(1, lines + 1)] and result.timings.steps == lines
        close(result.latents, alone(pool, request), SAME, of=request.id)


def traffic(cards: Mapping[str, Card], count: int, seed: int, most: int = 50) -> list[Request]:
    """Random requests of all pairs: most are refined, a third has a picture, half of these a mask."""
    rng, found = random.Random(seed), list[Request]()
    for number in range(count):
        model = rng.choice((*PAIRS, *sorted(cards)))
        samplers = valid_samplers(cards[model].schedule)
        request = any_request(cards[model], number, rng, sampler=rng.choice(samplers), id=f"r{number}")
        request = changed(request, steps=min(request.recipe.steps, most), text_length=cards[model].text_length)
        if rng.random() < 0.33:
            request = edited(request, rng.choice((0.3, 0.6, 1.0)), rng.random() < 0.5, number % 5)
        if cards[model].framing and rng.random() < 0.5:
            original, crop = rng.choice(((64, 64), (40, 96), (512, 480))), (rng.randrange(9), rng.randrange(9))
            request = changed(request, framing=Framing(original, crop, (32, 64)))
        if model in PAIRS and rng.random() < 0.8:
            request = refined(request, rng.choice((0.3, 0.5, 0.6, 0.8, 0.9, 1.0)))
        with contextlib.suppress(InvalidValue):  # no step is left
            cards[model].legs(request.recipe)
            found.append(request)
    return found


@pytest.mark.slow
def test_mixed_traffic_equals_each_request_alone(pool: Pool) -> None:
    requests = traffic(pool.cards, 110, seed=5, most=20)
    mixed = run_mixed(pool, requests, seed=1, cancel_every=4)
    gone = cancelled(mixed)
    assert gone == set(mixed.failures) and is_empty(mixed, pool)
    assert max(tick.rows for tick in mixed.forwards) >= 4, "the traffic never shared a forward"
    ended = [request for request in requests if request.id not in gone]
    assert sum(len(pool.cards[one.recipe.model].legs(one.recipe)) == 2 for one in ended) >= 20
    for request in ended:
        close(mixed.results[request.id, 0].latents, alone(pool, request), SAME, of=request.recipe)


@pytest.mark.slow
def test_deterministic_mode_is_bit_equal_alone_and_in_traffic(pool: Pool) -> None:
    requests = [one for one in traffic(pool.cards, 70, seed=6, most=10) if one.recipe.key.size == "32x32"]
    assert sum(len(pool.cards[one.recipe.model].legs(one.recipe)) == 2 for one in requests) >= 6
    seen = [run_mixed(pool, requests, seed=seed, deterministic=True) for seed in (0, 1)]
    for mixed in seen:
        assert max(tick.rows for tick in mixed.forwards) >= 3 and {tick.passes for tick in mixed.forwards} == {8}
    for request in requests:
        result = Bench(pool, deterministic=True).run([request]).results[request.id, 0]
        for mixed in seen:
            np.testing.assert_array_equal(mixed.results[request.id, 0].latents, result.latents)
            np.testing.assert_array_equal(mixed.results[request.id, 0].pixels, result.pixels)


def test_a_request_that_is_cancelled_at_any_time_leaves_nothing(pool: Pool) -> None:
    """Also between its legs, where a deadline far away keeps the row."""
    stays, stages = refined(draw("stays", 6, 2.0, seed=2), 0.6), set[tuple[str, int]]()
    whole = alone(pool, stays)
    for turns in range(14):
        bench = Bench(pool)
        bench.engine.submit(changed(refined(draw("gone", 6, 4.0, 0.9, True), 0.6), deadline=1e9))
        bench.engine.submit(stays)
        bench.turn(turns)
        rows = [
            one for one in gc.get_objects() if type(one) is Row and one.request.id == "gone" and one.stage != "gone"
        ]
        stages |= {(row.stage, row.leg) for row in rows}
        bench.engine.cancel("gone")
        bench.run()
        ended = "gone" in {name for name, _ in bench.results}
        assert ended or isinstance(bench.failures["gone"].error, Cancelled)
        assert is_empty(bench, pool) and not any(row.start or row.posterior is not None for row in rows)
        close(bench.results["stays", 0].latents, whole, SAME)
    assert stages >= {("waiting", 0), ("started", 0), ("waiting", 1), ("started", 1)}


def test_adapters_act_before_the_switch_alone(cards: dict[str, Card], tiny: Path, tmp_path: Path) -> None:
    """As if the first model had them in its weights; the refiner, of the same kind of network, has its own."""
    write_lora(tmp_path / "style.safetensors", tiny / "tiny-sd3", seed=4)
    own = {name: cards[name] for name in ("tiny-sd3", PAIRS["tiny-sd3"])}
    plain = refined(draw("one", 10, 3.0), 0.6)
    merged, pool = (load_all(Pool(one, "cpu", torch.float32)) for one in (own, surveyed(tmp_path, own)))
    before = by_hand(merged, plain)
    with torch.no_grad():
        for part, name, added in deltas(tiny / "tiny-sd3", [(tmp_path / "style.safetensors", 0.7)]):
            if added.any():
                own_names = dict(merged.models["tiny-sd3"].parts[part].value.named_parameters())
                own_names[name if name in own_names else name.removeprefix("text_model.")].add_(added.float())
    bench, request = Bench(pool), changed(plain, adapters=(("style", 0.7),))
    bench.engine.submit(request)
    bench.until(lambda: [row for row in bench.engine.batcher.started if row.leg])
    (adapter,) = pool.models["tiny-sd3"].adapters.values()
    assert adapter.leases == 0
    bench.until(lambda: bench.results)
    close(bench.results["one", 0].latents, by_hand(merged, plain), SAME)
    apart(before, by_hand(merged, plain), SAME)
    for one in (merged, pool):
        one.close()


def test_previews_go_on_over_the_switch(pool: Pool) -> None:
    """Those before it, after its last line too, are what the first model alone shows."""
    plain = changed(draw("seen", 10), previews=9)
    (row,) = rows_of(refined(plain, 0.5), pool.cards, 0.0, iter(range(9)))
    shown, expected = (
        [one.pixels.astype(int) for one in Bench(pool).run([asked, refined(draw("other", 20, 2.0))]).of(Preview)]
        for asked in (refined(plain, 0.5), plain)
    )
    assert len(shown) == len(expected) == 9 and 0 < row.ends < 9
    away = [np.abs(one - other).max() for one, other in zip(shown, expected, strict=True)]
    assert max(away[: row.ends]) <= 1 and min(away[row.ends :]) > 10


def test_a_latent_that_the_last_line_before_the_switch_spoils_fails_its_row_alone(pool: Pool) -> None:
    """It is read one work later, when the row has left its slot."""
    bench, good = Bench(pool), refined(draw("good", 6, seed=2), 0.6)
    for request in (refined(draw("bad", 6), 0.6), good):
        bench.engine.submit(request)
    rows: list[Row] = []
    while not rows or rows[0].line + 1 < rows[0].ends:
        bench.turn()
        rows = [row for row in bench.engine.batcher.started if row.request.id == "bad"]
    with torch.inference_mode():
        bench.engine.runner.slots[rows[0].key].x[rows[0].slot] = float("nan")
    bench.turn()
    assert rows[0].stage == "waiting" and rows[0].begun and not bench.failures
    bench.run()
    assert [(name, one.error.code) for name, one in bench.failures.items()] == [("bad", "non_finite_output")]
    assert is_empty(bench, pool)
    close(bench.results["good", 0].latents, alone(pool, good), SAME)


@pytest.mark.parametrize(("broken", "field"), [("tiny-dit", None), (PAIRS["tiny-dit"], "refiner")])
def test_an_error_of_the_refiner_is_of_that_field(
    cards: dict[str, Card], tmp_path: Path, broken: str, field: str | None
) -> None:
    others = {one: card for one, card in cards.items() if one in ("tiny-dit", PAIRS["tiny-dit"])}
    pool = Pool(others | {broken: others[broken].model_copy(update={"folder": tmp_path})}, "cpu", torch.float32)
    try:
        bench = Bench(pool)
        bench.engine.submit(refined(draw("broken", 4, model="tiny-dit", sampler="ddim"), 0.5))
        bench.until(lambda: bench.failures, failing=True)
        error = bench.failures["broken"].error
        assert (error.code, error.param) == ("model_load_failed", field)
    finally:
        pool.close()
