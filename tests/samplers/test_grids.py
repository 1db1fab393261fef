"""The grids of app/samplers/grids.py against diffusers' schedulers, at every count of steps from 1 to 1000."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from app.errors import InvalidValue
from app.samplers.grids import Array, Path
from app.samplers.schedule import DynamicShift, Schedule
from app.samplers.table import SAMPLERS, at_size
from tests.bench.upstream import scheduler_of
from tests.parts.close import EXACT, apart, close, each
from tests.samplers.oracle import UPSTREAM, diffusion_scheduler, flow_scheduler, wide

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

COUNTS = range(1, 1001)
WALKS = {name: walk for name, (walk, _, _) in SAMPLERS.items()}
DIFFUSION = [name for name in UPSTREAM if "epsilon" in SAMPLERS[name][2]]
ONE_TOO_MANY = {steps for steps in COUNTS if len(np.arange(1000, 0, -1000 / steps)) > steps}
"""Where rounding gives upstream's trailing a last step to t = -1, which ours leaves out."""


def grids(scheduler: Any) -> tuple[Array, Array]:
    """(timesteps, sigmas with the last 0) of upstream; a Heun lists all but its first twice."""
    t = np.asarray(scheduler.timesteps, np.float64)
    sigma = np.asarray(getattr(scheduler, "sigmas", np.append(t, 0)), np.float64)
    return (np.append(t[:1], t[1::2]), np.append(sigma[:-1:2], 0)) if "Heun" in type(scheduler).__name__ else (t, sigma)


def walk(sampler: str, schedule: Schedule, steps: int) -> Path | None:
    try:
        return WALKS[sampler](schedule, steps)
    except InvalidValue:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", DIFFUSION)
def test_diffusion_grids(sampler: str, spacing: str, offset: int) -> None:
    schedule = Schedule(kind="diffusion", spacing=spacing, steps_offset=offset)
    refused = []
    with wide():
        scheduler = diffusion_scheduler(schedule, sampler, "epsilon")
        for steps in COUNTS:
            path = walk(sampler, schedule, steps)
            if path is None:
                refused.append(steps)
                continue
            scheduler.set_timesteps(steps)
            t, sigma = grids(scheduler)
            if spacing == "trailing" and steps in ONE_TOO_MANY:
                assert len(t) == steps + 1 and t[-1] == -1
                t, sigma = t[:-1], np.append(sigma[:-2], 0)
            assert np.array_equal(path.here.t, t), steps
            if hasattr(scheduler, "sigmas"):
                close(path.here.sigma / path.here.alpha, sigma[:-1], EXACT, each)
    # Where leading has an offset, and for the multistep whose grids have a point more, the largest counts do not fit.
    most = 50 if sampler == "lcm" else 998
    assert all(steps > most for steps in refused) and len(refused) <= (950 if sampler == "lcm" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.5, 3.0, None])
@pytest.mark.parametrize("spacing", ["sd3", "flux"])
@pytest.mark.parametrize("sampler", [name for name in UPSTREAM if "flow" in SAMPLERS[name][2]])
def test_flow_grids(sampler: str, spacing: str, shift: float | None) -> None:
    """shift: None is FLUX's, by the size of an image."""
    line = DynamicShift() if shift is None else None
    schedule = Schedule(kind="flow", spacing=spacing, shift=shift or 1.0, dynamic_shift=line)
    sized = at_size(schedule, 1000)
    with wide():
        for steps in COUNTS:
            t, sigma = grids(flow_scheduler(schedule, sampler, steps, math.log(sized.shift)))
            path = WALKS[sampler](sized, steps)
            assert len(path.here.t) == len(t) == steps
            close(path.here.t, t, EXACT, each)
            assert path.there.sigma[-1] == sigma[-1] == 0
            close(path.here.sigma, sigma[:-1], EXACT, each)
    other = WALKS[sampler](sized.model_copy(update={"shift": sized.shift * 1.01}), COUNTS[-1])
    apart(other.here.sigma, path.here.sigma, EXACT, each, of="another shift:")


def test_the_baseline_of_a_respaced_card_is_within_one_timestep() -> None:
    """diffusers has no such grid; its linspace is the nearest, and not the same at many odd counts."""
    schedule = Schedule(kind="diffusion", spacing="respaced", variance="learned_range")
    scheduler, differ = scheduler_of(schedule, "ddpm"), 0
    for steps in COUNTS:
        scheduler.set_timesteps(steps)
        away = np.abs(grids(scheduler)[0] - WALKS["ddpm"](schedule, steps).here.t).max()
        assert away <= 1
        differ += bool(away)
    assert differ == 278
