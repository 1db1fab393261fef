"""Tables that start late, from a picture, with a mask and without: against diffusers' schedulers, and alone."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from app.errors import InvalidValue
from app.samplers.schedule import DynamicShift, Schedule
from app.samplers.table import COLUMNS, SAMPLERS, Table, at_size, compile_table, valid_pairs
from tests.parts.close import EXACT, SAME, apart, close
from tests.samplers.oracle import (
    PLACE,
    START,
    UPSTREAM,
    Array,
    Edit,
    Run,
    diffusion_scheduler,
    draw,
    flow_scheduler,
    network,
    run_table,
    run_upstream,
    wide,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

IMAGE = torch.from_numpy(1.5 * np.cos(5 * PLACE))
MASK = torch.from_numpy(np.arange(PLACE.size).reshape(PLACE.shape) % 3 == 0)
DIFFUSION, FLOW = Schedule(kind="diffusion"), Schedule(kind="flow", shift=3.0)
STRENGTHS = (0.6, *(pytest.param(strength, marks=pytest.mark.slow) for strength in (0.1, 0.3, 0.99, 1.0)))
MASKED = pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])


def of(sampler: str, **fields: Any) -> Schedule:
    """A schedule that goes with the sampler."""
    return (FLOW if "flow" in SAMPLERS[sampler][2] else DIFFUSION).model_copy(update=fields)


def late(sampler: str, steps: int, strength: float | None) -> Table:
    return compile_table(of(sampler), sampler, steps, strength=strength)


@pytest.mark.parametrize(
    ("steps", "strength", "diffusion", "flow"),
    [
        (28, 0.6, 12, 11),
        (28, 0.3, 20, 19),
        (28, 0.1, 26, 25),
        (30, 0.3, 21, 21),
        (20, 0.75, 5, 5),
        (50, 0.8, 10, 10),
        (28, 0.99, 1, 0),
        (28, 1.0, 0, 0),
        (1, 0.5, None, 0),
        (4, 0.2, None, 3),
    ],
)
def test_the_step_that_a_strength_starts_with(steps: int, strength: float, diffusion: int | None, flow: int) -> None:
    """None: no step is left, which is an error."""
    table = late("flow_euler", steps, strength)
    assert (table.first, table.lines) == (flow, steps - flow)
    if diffusion is None:
        with pytest.raises(InvalidValue, match="strength") as error:
            late("ddim", steps, strength)
        assert error.value.param == "strength"
    else:
        table = late("ddim", steps, strength)
        assert (table.first, table.lines) == (diffusion, steps - diffusion)


@pytest.mark.parametrize("sampler", ["ddim", "flow_euler"])
def test_every_strength_starts_where_diffusers_starts(sampler: str) -> None:
    """Also where a product is a little less than the number that it stands for: 100 * 0.29 is 28.999999999999996."""
    schedule, traps = of(sampler), 0
    for steps in (1, 2, 7, 28, 100):
        for strength in (percent / 100 for percent in range(1, 101)):
            scheduler = SimpleNamespace(timesteps=range(steps), order=1)
            pipeline = SimpleNamespace(scheduler=scheduler)
            runs, _ = START[schedule.kind](pipeline, steps, strength, None)
            traps += math.floor(steps * strength) != math.floor(round(steps * strength, 9))
            if len(runs):
                table = compile_table(schedule, sampler, steps, strength=strength)
                assert (table.first, table.lines) == (runs[0], len(runs)), (steps, strength)
            else:
                with pytest.raises(InvalidValue, match="none to run"):
                    compile_table(schedule, sampler, steps, strength=strength)
    assert traps, "no product was less than its whole number"
    assert late("ddim", 100, 0.29).first == 72 and late("flow_euler", 100, 0.29).first == 71


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_late_table_is_the_rest_of_the_whole_one_but_for_its_first_line(sampler: str) -> None:
    """Heun's two lines of a step stay together; a multistep solver's first line is of the first order."""
    whole, table = late(sampler, 10, None), late(sampler, 10, 0.6)
    each = 2 if "heun" in sampler else 1
    assert table.first == 4 and table.lines == whole.lines - 4 * each
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(table, name)[1:], getattr(whole, name)[4 * each + 1 :], err_msg=name)
    assert table.xm[0] == 0
    if "dpmpp" in sampler:
        assert whole.xm[4] != 0 and table.xm[1] != 0
        assert table.xo[0] != whole.xo[4]
        if sampler == "flow_dpmpp_2m_sd3":  # on the grid of Euler, so that its first line is Euler's
            assert table.xo[0] == late("flow_euler", 10, 0.6).xo[0]
    else:
        for name in COLUMNS:
            assert getattr(table, name)[0] == getattr(whole, name)[4 * each], name


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_where_it_starts_and_what_a_mask_keeps(sampler: str) -> None:
    """The factors are those of the point at which the network is asked next."""
    table, whole = late(sampler, 10, 0.6), late(sampler, 10, None)
    each = 2 if "heun" in sampler else 1
    assert table.start == (whole.ka[4 * each - 1], whole.kb[4 * each - 1])
    assert (table.ka[-1], table.kb[-1]) == (1, 0)
    alpha, sigma = np.array(table.ka[:-1]), np.array(table.kb[:-1])
    c_in = table.c_in[1:]
    if "flow" in sampler:
        close(alpha + sigma, np.ones_like(alpha), EXACT)
    else:
        close(c_in**2 * (alpha**2 + sigma**2), np.ones_like(alpha), EXACT)
    assert np.all(np.diff(sigma / alpha) <= 0), "less and less noise"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_one_is_the_whole_table(sampler: str) -> None:
    table, whole = late(sampler, 7, 1.0), late(sampler, 7, None)
    assert (table.first, table.lines, table.init) == (whole.first, whole.lines, whole.init) and table.first == 0
    np.testing.assert_array_equal(table.coefficients(), whole.coefficients())


def test_the_shift_of_a_size_moves_the_start() -> None:
    schedule = Schedule(kind="flow", spacing="flux", dynamic_shift=DynamicShift())
    few, many = (compile_table(schedule, "flow_euler", 8, tokens=tokens, strength=0.5) for tokens in (256, 4096))
    assert (few.first, few.lines) == (many.first, many.lines) == (4, 4)
    assert few.start[1] < many.start[1] and sum(few.start) == pytest.approx(1)


def scheduler_of(schedule: Schedule, sampler: str, steps: int, tokens: int) -> Any:
    if schedule.kind == "flow":
        return flow_scheduler(schedule, sampler, steps, math.log(at_size(schedule, tokens).shift))
    scheduler = diffusion_scheduler(schedule, sampler, schedule.prediction)
    scheduler.set_timesteps(steps)
    return scheduler


def both(
    schedule: Schedule, sampler: str, steps: int, strength: float, mask: torch.Tensor | None
) -> tuple[Table, Array, Edit, Run]:
    """A table, its noise, how it starts, and what diffusers' scheduler makes of that."""
    table = compile_table(schedule, sampler, steps, tokens=1000, strength=strength)
    noise, edit = draw(table.lines), Edit(IMAGE, strength, mask)
    learned = sampler == "ddpm" and schedule.variance == "learned_range"
    scheduler = scheduler_of(schedule, sampler, steps, 1000)
    return table, noise, edit, run_upstream(scheduler, network, noise, learned, edit)


def same(table: Table, noise: Array, edit: Edit, theirs: Run, of: Any = "") -> None:
    """After every line: the networks here see each place alone, so the last latent says nothing of what masks keep."""
    ours = run_table(table, network, noise, edit=edit)
    for own, their in zip(ours.states + ours.clean, theirs.states + theirs.clean, strict=True):
        close(own, their, EXACT, of=of)


PAIRS = [pair for pair in valid_pairs() if pair[0] in UPSTREAM and pair != ("euler_ancestral", "sample")]
"""NOTE: diffusers' ancestral Euler has no sample prediction; test_table.py compares that table by another way."""
GRIDS = {"diffusion": ("leading", "linspace", "trailing"), "flow": ("sd3", "flux")}


@MASKED
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("sampler", "prediction"), PAIRS)
def test_it_is_that_of_diffusers(sampler: str, prediction: str, strength: float, mask: torch.Tensor | None) -> None:
    kind = of(sampler).kind
    with wide():
        for spacing in GRIDS[kind]:
            schedule = of(sampler, prediction=prediction, spacing=spacing)
            same(*both(schedule, sampler, 28, strength, mask), of=spacing)


@MASKED
def test_a_learned_variance_and_a_dynamic_shift_too(mask: torch.Tensor | None) -> None:
    dynamic = FLOW.model_copy(update={"spacing": "flux", "dynamic_shift": DynamicShift()})
    learned = DIFFUSION.model_copy(update={"variance": "learned_range"})
    with wide():
        for schedule, sampler in ((dynamic, "flow_euler"), (dynamic, "flow_dpmpp_2m"), (learned, "ddpm")):
            same(*both(schedule, sampler, 28, 0.6, mask), of=sampler)


@MASKED
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_coefficients_give_the_same_image(sampler: str, mask: torch.Tensor | None) -> None:
    table, edit = late(sampler, 28, 0.6), Edit(IMAGE, 0.6, mask)
    noise = draw(table.lines)
    single, double = (run_table(table, network, noise, kind, edit).final for kind in (np.float32, np.float64))
    close(single, double, 2 * SAME if "heun" in sampler else SAME)


@pytest.mark.parametrize("sampler", sorted({name for name, _ in PAIRS}))
def test_faults_are_far_from_diffusers(sampler: str) -> None:
    """The start a step off, the mask inverted, the picture left out, a first line of the second order."""
    schedule = of(sampler)
    with wide():
        table, noise, edit, theirs = both(schedule, sampler, 28, 0.6, MASK)
        for off in (-1, 1):
            moved = compile_table(schedule, sampler, 28, tokens=1000, strength=0.6 + off / 28)
            assert moved.first == table.first - off
            apart(run_table(moved, network, draw(moved.lines), edit=edit).final, theirs.final, SAME, of=off)
        for wrong in (replace(edit, mask=~MASK), replace(edit, image=0 * IMAGE)):
            apart(run_table(table, network, noise, edit=wrong).final, theirs.final, SAME)
        if "dpmpp" in sampler:
            whole, at = compile_table(schedule, sampler, 28, tokens=1000), table.first
            second = {name: np.append(getattr(whole, name)[at], getattr(table, name)[1:]) for name in COLUMNS}
            apart(run_table(replace(table, **second), network, noise, edit=edit).final, theirs.final, EXACT)


def test_what_a_mask_keeps_is_not_the_point_that_ddim_reaches() -> None:
    """With linspace its steps do not end at the next timestep; the pipelines add the noise of the next timestep."""
    schedule = of("ddim", spacing="linspace")
    with wide():
        table, noise, edit, theirs = both(schedule, "ddim", 28, 0.6, MASK)
        there = SAMPLERS["ddim"][0](schedule, 28)[table.first :].there
        reached = replace(table, ka=there.alpha.copy(), kb=there.sigma.copy())
        apart(run_table(reached, network, noise, edit=edit).states[-2], theirs.states[-2], EXACT)


def test_pure_noise_at_strength_one_is_for_masks_alone() -> None:
    """Inpainting at strength 1 begins with noise at the scheduler's own scale, img2img with the picture in it."""
    masks = (MASK, None)
    with wide():
        for mask, other in zip(masks, reversed(masks), strict=True):
            table, noise, edit, theirs = both(DIFFUSION, "euler", 10, 1.0, mask)
            same(table, noise, edit, theirs)
            apart(run_table(table, network, noise, edit=replace(edit, mask=other)).states[0], theirs.states[0], SAME)
    assert table.start[0] == 1 and table.init == pytest.approx(math.hypot(table.start[1], 1))
