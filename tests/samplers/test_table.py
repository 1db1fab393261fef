"""The compiler of app/samplers/table.py against diffusers' schedulers, and its errors."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from app.errors import InvalidValue
from app.samplers.schedule import DynamicShift, Schedule
from app.samplers.table import COLUMNS, SAMPLERS, at_size, compile_table, most_steps, valid_pairs, valid_samplers
from tests.parts.close import EXACT, SAME, apart, close
from tests.samplers.oracle import (
    UPSTREAM,
    Array,
    Network,
    diffusion_scheduler,
    draw,
    flow_scheduler,
    network,
    run_table,
    run_upstream,
    wide,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

STEPS = pytest.mark.parametrize(
    "counts",
    [
        pytest.param((1, 2, 4, 10, 28), id="few steps"),
        pytest.param((50, 250), id="many steps", marks=pytest.mark.slow),
    ],
)
"""Numbers of steps for each of which a table is compared."""
DIFFUSION_PAIRS = [pair for pair in valid_pairs() if pair[1] != "flow"]
FLOW_SAMPLERS = [name for name, prediction in valid_pairs() if prediction == "flow" and name in UPSTREAM]
SCALED = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def noise_predicted(table_t: Array, level: Array) -> Network:
    """`network` as a prediction of the noise where it predicts x0, for an upstream that has no sample prediction."""

    def net(seen: Array, t: float) -> Array:
        sigma = np.interp(t, table_t[::-1], level[::-1])
        return (np.hypot(1, sigma) * seen - network(seen, t)) / sigma

    return net


def same_as_upstream(schedule: Schedule, sampler: str, steps: int, bound: float) -> None:
    """One table against one scheduler: the final latent, and the clean latent of every line."""
    table = compile_table(schedule, sampler, steps)
    noise, net, prediction = draw(table.lines), network, schedule.prediction
    if (sampler, prediction) == ("euler_ancestral", "sample"):
        net, prediction = noise_predicted(table.t, np.sqrt(1 / table.c_in**2 - 1)), "epsilon"
    scheduler = diffusion_scheduler(schedule, sampler, prediction)
    scheduler.set_timesteps(steps)
    theirs = run_upstream(scheduler, net, noise, sampler == "ddpm" and schedule.variance == "learned_range")
    ours = run_table(table, network, noise)
    close(ours.final, theirs.final, bound)
    for own, their in zip(ours.clean, theirs.clean, strict=True):
        close(own, their, bound)


@STEPS
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(("sampler", "prediction"), DIFFUSION_PAIRS)
def test_diffusion_is_that_of_diffusers(sampler, prediction, spacing, counts):
    schedule = Schedule(kind="diffusion", prediction=prediction, spacing=spacing)
    with wide():
        for steps in counts:
            same_as_upstream(schedule, sampler, min(steps, most_steps(schedule, sampler, 1000)), EXACT)


@STEPS
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_ddpm_variances_are_those_of_diffusers(variance, spacing, counts):
    schedule = Schedule(kind="diffusion", spacing=spacing, variance=variance)
    with wide():
        for steps in counts:
            same_as_upstream(schedule, "ddpm", steps, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "prediction"), DIFFUSION_PAIRS)
def test_scaled_betas_offset_final_alpha_and_train_steps_are_those_of_diffusers(sampler, prediction):
    rest = {"steps_offset": 1, "set_alpha_to_one": False, "train_steps": 400}
    schedule = Schedule(kind="diffusion", prediction=prediction, **SCALED, **rest)
    with wide():
        for steps in (1, 7, 30):
            same_as_upstream(schedule, sampler, steps, EXACT)


@STEPS
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spacing", ["sd3", "flux"])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_flow_is_that_of_diffusers(sampler, spacing, dynamic, counts):
    tokens = 1000
    schedule = Schedule(kind="flow", spacing=spacing, shift=3.0, dynamic_shift=DynamicShift() if dynamic else None)
    mu = math.log(at_size(schedule, tokens).shift)
    with wide():
        for steps in counts:
            table = compile_table(schedule, sampler, steps, tokens=tokens)
            noise = draw(table.lines)
            theirs = run_upstream(flow_scheduler(schedule, sampler, steps, mu), network, noise)
            ours = run_table(table, network, noise)
            close(ours.final, theirs.final, EXACT)
            for own, their in zip(ours.clean, theirs.clean, strict=True):
                close(own, their, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "prediction"), DIFFUSION_PAIRS)
def test_upstream_in_its_own_float32_is_within_what_is_promised(sampler, prediction):
    schedule = Schedule(kind="diffusion", prediction=prediction, spacing="trailing", **SCALED)
    for steps in (4, 28):
        same_as_upstream(schedule, sampler, steps, SAME)


@pytest.mark.parametrize(("sampler", "prediction"), valid_pairs())
def test_float32_coefficients_give_the_same_image(sampler, prediction):
    # A heun step to a low sigma' is sigma / sigma' times a difference of x and mem, both near x0: that costs digits.
    bound = 2 * SAME if "heun" in sampler else SAME
    schedule = Schedule(kind="flow" if prediction == "flow" else "diffusion", prediction=prediction)
    for steps in (4, 28, 50):
        table = compile_table(schedule, sampler, steps)
        noise = draw(table.lines)
        single, double = (run_table(table, network, noise, kind).final for kind in (np.float32, np.float64))
        close(single, double, bound)
        if steps == 4:
            more = compile_table(schedule, sampler, 5)
            apart(run_table(more, network, draw(more.lines)).final, double, bound, of="a step more:")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_lines_and_noise(sampler):
    prediction = SAMPLERS[sampler][2][0]
    table = compile_table(Schedule(kind="flow" if prediction == "flow" else "diffusion"), sampler, 10)
    assert table.lines == (19 if "heun" in sampler else 10)
    assert table.xz.any() == (sampler in ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm"))
    assert not table.zf.any() and table.xm[0] == 0
    assert table.coefficients().dtype == np.float32
    assert table.coefficients().shape == (table.lines, len(COLUMNS))
    np.testing.assert_array_equal(table.coefficients()[:, 0], table.t.astype(np.float32))


def test_a_table_is_shared_so_it_cannot_be_written():
    schedule = Schedule(kind="flow")
    table = compile_table(schedule, "flow_euler", 4)
    assert compile_table(Schedule(kind="flow"), "flow_euler", 4, tokens=64) is table
    with pytest.raises(ValueError, match="read-only"):
        table.xx[0] = 0
    with pytest.raises(FrozenInstanceError):
        table.init = 2.0


def test_samplers_of_a_schedule():
    assert valid_samplers(Schedule(kind="flow")) == ("flow_euler", "flow_heun", "flow_dpmpp_2m", "flow_dpmpp_2m_sd3")
    for prediction in ("epsilon", "v", "sample"):
        names = valid_samplers(Schedule(kind="diffusion", prediction=prediction))
        assert names == ("ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "lcm")


@pytest.mark.parametrize(("kind", "sampler"), [("flow", "ddim"), ("diffusion", "flow_euler"), ("flow", "lms")])
def test_an_invalid_pair_names_the_valid_samplers(kind, sampler):
    schedule = Schedule(kind=kind)
    with pytest.raises(InvalidValue) as error:
        compile_table(schedule, sampler, 10)
    assert error.value.param == "sampler"
    assert sampler in error.value.message and ", ".join(valid_samplers(schedule)) in error.value.message


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(InvalidValue, match=str(steps)) as error:
        compile_table(Schedule(kind="diffusion"), "ddim", steps)
    assert error.value.param == "num_inference_steps"
