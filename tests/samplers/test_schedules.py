"""The walks of app/samplers/grids.py: alpha-bar, grids, shifts, and what is refused."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.errors import CardError, InvalidValue
from app.samplers import grids as schedules
from app.samplers.grids import alpha_bar
from app.samplers.schedule import DynamicShift, Schedule
from app.samplers.table import at_size
from tests.parts.close import FORWARD, apart, close, each


def diffusion(**fields) -> Schedule:
    return Schedule(kind="diffusion", **fields)


def flow(**fields) -> Schedule:
    return Schedule(kind="flow", **fields)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("train_steps", [1, 400, 1000])
def test_alpha_bar_is_that_of_diffusers(betas, train_steps):
    schedule = diffusion(betas=betas, train_steps=train_steps, beta_start=0.00085, beta_end=0.012)
    theirs = diffusers.DDIMScheduler(
        beta_schedule=betas, num_train_timesteps=train_steps, beta_start=0.00085, beta_end=0.012
    ).alphas_cumprod
    close(alpha_bar(schedule), theirs, FORWARD, each)
    apart(alpha_bar(schedule.model_copy(update={"beta_start": 0.0017})), theirs, FORWARD, each)


def test_betas_that_leave_no_signal_are_refused():
    with pytest.raises(CardError, match="signal"):
        alpha_bar(diffusion(beta_start=0.5, beta_end=0.99))


@pytest.mark.parametrize(
    ("walk", "spacing", "expected"),
    [
        (schedules.ddpm_path, "leading", [750, 500, 250, 0]),
        (schedules.ddpm_path, "linspace", [999, 666, 333, 0]),
        (schedules.ddpm_path, "trailing", [999, 749, 499, 249]),
        (schedules.dpm_path, "leading", [800, 600, 400, 200]),
        (schedules.dpm_path, "linspace", [999, 749, 500, 250]),
        (schedules.dpm_path, "trailing", [999, 749, 499, 249]),
    ],
)
def test_timesteps(walk, spacing, expected):
    assert walk(diffusion(spacing=spacing), 4).here.t.tolist() == expected


def test_ddim_steps_by_a_whole_stride_not_to_the_next_timestep():
    path = schedules.ddim_path(diffusion(spacing="linspace"), 4)
    assert path.here.t.tolist() == [999, 666, 333, 0]
    assert path.there.t.tolist() == [749, 416, 83, -1]


@pytest.mark.parametrize("steps", range(1, 1001, 7))
def test_trailing_never_steps_below_zero(steps):
    t = schedules.ddpm_path(diffusion(spacing="trailing"), steps).here.t
    assert len(t) == steps and t[0] == 999 and t[-1] >= 0


def test_flow_grids_are_those_of_sd3_and_flux():
    sd3 = schedules.flow_path(flow(shift=3.0), 4).here
    flux = schedules.flow_path(flow(shift=3.0, spacing="flux"), 4).here
    np.testing.assert_allclose(sd3.sigma, [1, 0.858, 0.602, 0.009], atol=5e-4)
    np.testing.assert_allclose(flux.sigma, [1, 0.9, 0.75, 0.5])
    np.testing.assert_allclose(flux.t, [1000, 900, 750, 500])


def test_dynamic_shift_is_a_line_in_the_tokens_and_ignores_the_static_one():
    schedule = flow(spacing="flux", shift=7.0, dynamic_shift=DynamicShift())
    assert at_size(schedule, 256).shift == pytest.approx(math.exp(0.5))
    assert at_size(schedule, 4096).shift == pytest.approx(math.exp(1.15))
    assert at_size(schedule, 2176).shift == pytest.approx(math.exp(0.825))
    with pytest.raises(InvalidValue) as error:
        at_size(schedule, None)
    assert error.value.param == "size"


def test_a_dynamic_shift_through_one_point_is_no_line():
    with pytest.raises(ValidationError, match="max_tokens"):
        DynamicShift(base_tokens=256, max_tokens=256)


@pytest.mark.parametrize(
    ("walk", "fields", "steps"),
    [
        (schedules.ddim_path, {"train_steps": 400}, 401),
        (schedules.ddpm_path, {"spacing": "trailing"}, 1001),
        (schedules.dpm_path, {"spacing": "linspace"}, 1000),
        (schedules.dpm_path, {"spacing": "leading"}, 1000),
        (schedules.exploding_path, {"spacing": "leading"}, 1001),
        (schedules.ddim_path, {"spacing": "leading", "steps_offset": 1}, 1000),
    ],
)
def test_more_steps_than_the_grid_holds_are_refused(walk, fields, steps):
    with pytest.raises(InvalidValue, match=f"{steps} steps") as error:
        walk(diffusion(**fields), steps)
    assert error.value.param == "num_inference_steps"
    assert len(walk(diffusion(**fields), steps - 1).here.t) == steps - 1


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.integers(1, 1200), shift=st.floats(0.2, 12), spacing=st.sampled_from(["sd3", "flux"]))
def test_every_flow_walk_falls_from_noise_to_the_clean_end(steps, shift, spacing):
    for walk in (schedules.flow_path, schedules.flow_dpm_path):
        path = walk(flow(spacing=spacing, shift=shift), steps)
        assert len(path.here.t) == steps and path.there.sigma[-1] == 0
        assert np.all(path.there.sigma < path.here.sigma)
        assert np.all((path.here.t >= 0) & (path.here.t <= 1000))
