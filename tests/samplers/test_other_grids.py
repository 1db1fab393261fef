"""Grids in place of a card's own (GRIDS of app/samplers/grids.py): against diffusers' schedulers, run step by step.

sgm_uniform, which diffusers does not have, is walked by its schedulers too; `sgm_uniform` of oracle.py makes it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from app.errors import InvalidValue
from app.samplers.grids import GRIDS
from app.samplers.schedule import DynamicShift, Schedule
from app.samplers.table import (
    SAMPLERS,
    Table,
    at_size,
    compile_legs,
    compile_table,
    most_steps,
    valid_grids,
    valid_pairs,
    valid_samplers,
)
from tests.parts.close import EXACT, SAME, apart, close
from tests.samplers.oracle import (
    PLACE,
    UPSTREAM,
    Edit,
    Later,
    Run,
    diffusion_scheduler,
    draw,
    flow_scheduler,
    network,
    run_table,
    run_upstream,
    set_steps,
    wide,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

SD = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACED: list[dict[str, Any]] = [
    {"spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    {"spacing": "linspace"},
    {"spacing": "trailing"},
]
PAIRS = [
    (sampler, prediction)
    for sampler, prediction in valid_pairs()
    if valid_grids(sampler) and prediction in ("epsilon", "v")
]
WALKERS = list(dict.fromkeys(sampler for sampler, _ in PAIRS))
IMAGE = torch.from_numpy(1.5 * np.cos(5 * PLACE))
MASK = torch.from_numpy(np.arange(PLACE.size).reshape(PLACE.shape) % 3 == 0)
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS)
EACH_SPACING = pytest.mark.parametrize(
    ("spaced", "counts"),
    [
        pytest.param(SPACED[0], (1, 2, 4, 10, 28), id="leading"),
        *(pytest.param(spaced, (1, 4, 50, 250), id=spaced["spacing"], marks=pytest.mark.slow) for spaced in SPACED),
    ],
)


def card(**fields: Any) -> Schedule:
    """The schedule of an SD checkpoint."""
    return Schedule(kind="diffusion", **SD | fields)


def upstream(schedule: Schedule, sampler: str, steps: int, grid: str) -> Any:
    scheduler = diffusion_scheduler(schedule, sampler, schedule.prediction, grid)
    return set_steps(scheduler, schedule, sampler, steps, grid)


def same(ours: Run, theirs: Run, bound: float = EXACT, of: Any = "") -> None:
    for own, their in zip(ours.states + ours.clean, theirs.states + theirs.clean, strict=True):
        close(own, their, bound, of=of)


@EACH_SPACING
@EVERY_GRID
@pytest.mark.parametrize(("sampler", "prediction"), PAIRS)
def test_it_is_that_of_diffusers(
    sampler: str, prediction: str, grid: str, spaced: dict[str, Any], counts: tuple[int, ...]
) -> None:
    schedule = card(prediction=prediction, **spaced)
    with wide():
        for steps in counts:
            table = compile_table(schedule, sampler, steps, grid=grid)
            noise = draw(table.lines)
            theirs = run_upstream(upstream(schedule, sampler, steps, grid), network, noise)
            same(run_table(table, network, noise), theirs, of=steps)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@EVERY_GRID
@pytest.mark.parametrize("sampler", WALKERS)
def test_a_late_start_is_that_of_diffusers(sampler: str, grid: str, mask: torch.Tensor | None) -> None:
    schedule = card(**SPACED[0])
    with wide():
        for strength in (0.3, 0.6):
            table, edit = (
                compile_table(schedule, sampler, 28, strength=strength, grid=grid),
                Edit(IMAGE, strength, mask),
            )
            noise = draw(table.lines)
            theirs = run_upstream(upstream(schedule, sampler, 28, grid), network, noise, edit=edit)
            same(run_table(table, network, noise, edit=edit), theirs, of=strength)
        later = compile_table(schedule, sampler, 28, strength=0.6 + 1 / 28, grid=grid)
        apart(run_table(later, network, draw(later.lines), edit=edit).final, theirs.final, EXACT, of="a step more:")


def legs(schedule: Schedule, sampler: str, grid: str, switch_at: float) -> tuple[Table, Table]:
    first, second = compile_legs(schedule, sampler, 30, grid=grid, switch_at=switch_at)
    assert first is not None and second is not None
    return first, second


def switched(first: Table, second: Table, noise: np.ndarray) -> Run:
    """Two tables one after the other: the second starts with the latent of the first, and without its memory."""
    before = run_table(first, network, noise[: first.lines + 1])
    rest = np.concatenate([noise[:1], noise[first.lines + 1 :]])
    edit = Edit(torch.from_numpy(before.final), 0.5)
    after = run_table(replace(second, start=(1.0, 0.0)), network, rest, edit=edit)
    return Run(before.states + after.states, before.clean + after.clean)


@pytest.mark.parametrize("grid", ["", *GRIDS])
@pytest.mark.parametrize("sampler", [name for name, prediction in valid_pairs() if prediction == "epsilon"])
def test_a_switch_is_that_of_the_two_pipelines(sampler: str, grid: str) -> None:
    """The first scheduler ends, and one with no memory begins, where the timesteps pass under the cutoff."""
    if grid and grid not in valid_grids(sampler):
        with pytest.raises(InvalidValue, match="schedule: "):
            compile_legs(card(), sampler, 30, grid=grid, switch_at=0.8)
        return
    schedule = card(**SPACED[0])
    with wide():
        first, second = legs(schedule, sampler, grid, 0.8)
        noise = draw(first.lines + second.lines)
        base, refiner = (upstream(schedule, sampler, 30, grid) for _ in range(2))
        steps = np.append(base.timesteps[:1], base.timesteps[1::2]) if base.order == 2 else base.timesteps.numpy()
        count = int((steps >= 200).sum())
        assert 0 < count < 30 and second.first == count
        before = run_upstream(base, network, noise[: first.lines + 1], stop=count)
        rest = np.concatenate([noise[:1], noise[first.lines + 1 :]])
        after = run_upstream(refiner, network, rest, edit=Later(torch.from_numpy(before.final), count))
        theirs = Run(before.states + after.states, before.clean + after.clean)
        same(switched(first, second, noise), theirs)
        if "dpmpp" in sampler:  # where the switch is shows in a multistep solver, which begins anew there
            moved = legs(schedule, sampler, grid, 0.8 + 2 * float(steps[count - 1] - steps[count]) / 1000)
            assert moved[1].first > count
            apart(switched(*moved, noise).final, theirs.final, EXACT, of="another switch:")


@EVERY_GRID
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spacing", ["sd3", "flux"])
@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun"])
def test_flow_is_that_of_diffusers(sampler: str, spacing: str, dynamic: bool, grid: str) -> None:
    schedule = Schedule(kind="flow", spacing=spacing, shift=3.0, dynamic_shift=DynamicShift() if dynamic else None)
    mu = math.log(at_size(schedule, 1000).shift)
    with wide():
        for steps in (1, 4, 28):
            table = compile_table(schedule, sampler, steps, tokens=1000, grid=grid)
            noise = draw(table.lines)
            theirs = run_upstream(flow_scheduler(schedule, sampler, steps, mu, grid), network, noise)
            same(run_table(table, network, noise), theirs, of=steps)
        own = compile_table(schedule, sampler, 28, tokens=1000)
        apart(run_table(own, network, noise).final, theirs.final, EXACT, of="the card's own:")


@EVERY_GRID
@pytest.mark.parametrize("sampler", WALKERS)
def test_another_grid_and_another_count_are_far(sampler: str, grid: str) -> None:
    schedule = card(**SPACED[0])
    with wide():
        scheduler = upstream(schedule, sampler, 28, grid)
        lines = len(scheduler.timesteps)
        theirs = run_upstream(scheduler, network, draw(lines)).final
    for other in {"", *GRIDS} - {grid}:
        table = compile_table(schedule, sampler, 28, grid=other)
        apart(run_table(table, network, draw(lines)).final, theirs, EXACT, of=other)
    for steps in (27, 29):
        table = compile_table(schedule, sampler, steps, grid=grid)
        apart(run_table(table, network, draw(table.lines)).final, theirs, EXACT, of=steps)


@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_timesteps_of_the_multistep_are_whole(sampler: str, grid: str) -> None:
    """Upstream rounds or cuts them; left as they are, they make another picture, and so does a cut for a rounding."""
    schedule = card(spacing="linspace")
    table = compile_table(schedule, sampler, 28, grid=grid)
    noise, exact = draw(28), compile_table(schedule, "euler", 28, grid=grid)
    close(table.kb[:-1] / table.ka[:-1], exact.kb[:-1], EXACT)
    assert np.array_equal(table.t, np.round(table.t)) and np.abs(table.t - exact.t).max() <= 1
    with wide():
        theirs = run_upstream(upstream(schedule, sampler, 28, grid), network, noise).final
    close(run_table(table, network, noise).final, theirs, EXACT)
    for t in (exact.t, np.floor(exact.t) if grid == "karras" else np.round(exact.t)):
        apart(run_table(replace(table, t=t.copy()), network, noise).final, theirs, EXACT)


@pytest.mark.slow
@EVERY_GRID
@pytest.mark.parametrize(("sampler", "prediction"), PAIRS)
def test_upstream_in_its_own_float32_is_within_what_is_promised(sampler: str, prediction: str, grid: str) -> None:
    schedule = card(prediction=prediction)
    for steps in (4, 28):
        table = compile_table(schedule, sampler, steps, grid=grid)
        noise, scheduler = draw(table.lines), upstream(schedule, sampler, steps, grid)
        if grid == "exponential" and "dpmpp" in sampler:  # here float32 cuts 999 to 998, as NOTE of dpm_path says
            assert table.t[0] - scheduler.timesteps[0] == 1
            scheduler.timesteps[0] = 999
        theirs = run_upstream(scheduler, network, noise)
        close(run_table(table, network, noise).final, theirs.final, SAME, of=steps)


@EVERY_GRID
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if valid_grids(name)])
def test_float32_coefficients_give_the_same_image(sampler: str, grid: str) -> None:
    schedule = Schedule(kind="flow", shift=3.0) if "flow" in sampler else card()
    for steps in (4, 28, 50):
        table = compile_table(schedule, sampler, steps, grid=grid)
        noise = draw(table.lines)
        single, double = (run_table(table, network, noise, kind).final for kind in (np.float32, np.float64))
        close(single, double, 2 * SAME if "heun" in sampler else SAME)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_grid_that_a_sampler_does_not_walk_names_those_that_do(sampler: str) -> None:
    schedule = Schedule(kind="flow" if "flow" in sampler else "diffusion")
    wrong = ("shift",) if valid_grids(sampler) else ("karras", "shift")
    for grid in wrong:
        with pytest.raises(InvalidValue) as error:
            compile_table(schedule, sampler, 10, grid=grid)
        assert error.value.param == "schedule"
        assert f'"{grid}" does not go with {sampler}; karras, exponential, sgm_uniform go with' in error.value.message
        takers = error.value.message.rpartition(" go with ")[2].split(", ")
        assert takers == [name for name in valid_samplers(schedule) if valid_grids(name)] != []


def test_which_samplers_walk_them() -> None:
    assert {name for name in UPSTREAM if not valid_grids(name)} == {"ddim", "ddpm", "lcm", "flow_dpmpp_2m"}
    assert valid_grids("dpmpp_2m") == ("karras", "exponential", "sgm_uniform")


@pytest.mark.parametrize("sampler", WALKERS)
def test_a_grid_has_room_for_as_many_steps_as_the_own_spacing(sampler: str) -> None:
    schedule = card(spacing="leading", train_steps=60)
    most = most_steps(schedule, sampler, 100)
    assert most == (59 if "dpmpp" in sampler else 60)
    for grid in GRIDS:
        assert np.all(np.diff(compile_table(schedule, sampler, most, grid=grid).kb) <= 0)
        with pytest.raises(InvalidValue, match=f"{most + 1} steps"):
            compile_table(schedule, sampler, most + 1, grid=grid)


@pytest.mark.parametrize(
    ("grid", "levels", "timesteps"),
    [
        ("karras", [14.614641, 4.796535, 1.2741, 0.24795, 0.029167], [999, 785.9536, 427.4887, 58.891, 0]),
        ("exponential", [14.614641, 3.088977, 0.652892, 0.137996, 0.029167], [999, 680.6662, 233.2082, 20.0016, 0]),
        ("sgm_uniform", [14.614641, 5.092408, 2.27973, 1.162865, 0.571189], [999, 799.2, 599.4, 399.6, 199.8]),
    ],
)
def test_the_levels_of_sd_are_those_of_k_diffusion(grid: str, levels: list[float], timesteps: list[float]) -> None:
    """Printed by k-diffusion 0.1.1: get_sigmas_karras, get_sigmas_exponential, and A1111's sgm_uniform with its
    DiscreteSchedule."""
    table = compile_table(card(spacing="linspace"), "euler", 5, grid=grid)
    np.testing.assert_allclose(table.kb[:-1], levels[1:], atol=1e-6)
    np.testing.assert_allclose(table.t, timesteps, atol=1e-4)
    assert table.init == pytest.approx(levels[0])
    multistep = compile_table(card(), "dpmpp_2m", 5, grid=grid)
    np.testing.assert_allclose(multistep.kb[:-1] / multistep.ka[:-1], levels[1:], atol=1e-6)


def test_lcm_takes_the_timesteps_it_was_distilled_on() -> None:
    for spaced in SPACED:
        table = compile_table(card(**spaced), "lcm", 4)
        assert table.t.tolist() == [999, 759, 499, 259] and table.init == 1
    assert most_steps(card(), "lcm", 100) == 50
    assert table.xz[-1] == 0 and np.all(table.xz[:-1] == table.kb[:-1])
