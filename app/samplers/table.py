"""Table: the compiled plan of a row, one line for each evaluation of the network.

    x' = xx*x + xo*out + xm*mem + xz*exp(0.5*zf*frac)*noise        mem' = mx*x + mo*out

out is what the network gives for c_in*x at t, mem always the predicted clean latent. A table is schedule x prediction x
solver: the prediction says x0 = p*(c_in*x) + q*out, the solver x' = a*x + b*x0 + c*mem + z*noise, and here they meet.
Where a mask keeps the source, x' = ka*source + kb*first_noise instead: the source with the noise of the next line.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from app.errors import CardError, InvalidValue
from app.samplers import grids, solvers
from app.samplers.grids import Array, Path, Walk
from app.samplers.schedule import Schedule
from app.samplers.solvers import Lines, Rule

COLUMNS = ("t", "c_in", "xx", "xo", "xm", "xz", "zf", "mx", "mo", "ka", "kb")

PREDICTIONS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (0 * alpha, np.ones_like(alpha)),
    "flow": lambda alpha, sigma: (np.ones_like(alpha), -sigma),
}
"""(p, q) of x0 = p*x + q*out for a network that sees x = alpha*x0 + sigma*noise and predicts the noise, the velocity
alpha*noise - sigma*x0 (Salimans and Ho 2022, arXiv 2202.00512, appendix D), x0, or the flow noise - x0."""


DIFFUSION = ("epsilon", "v", "sample")
FLOW = ("flow",)

SAMPLERS: dict[str, tuple[Walk, Rule, tuple[str, ...]]] = {
    "ddim": (grids.ddim_path, solvers.first_order, DIFFUSION),
    "ddpm": (grids.ddpm_path, solvers.ddpm, DIFFUSION),
    "euler": (grids.exploding_path, solvers.first_order, DIFFUSION),
    "euler_ancestral": (grids.exploding_path, solvers.euler_ancestral, DIFFUSION),
    "heun": (grids.exploding_path, solvers.heun, DIFFUSION),
    "dpmpp_2m": (grids.dpm_path, solvers.dpmpp_2m, DIFFUSION),
    "dpmpp_2m_sde": (grids.dpm_path, solvers.dpmpp_2m_sde, DIFFUSION),
    "lcm": (grids.lcm_path, solvers.lcm, DIFFUSION),
    "flow_euler": (grids.flow_path, solvers.first_order, FLOW),
    "flow_heun": (grids.flow_path, solvers.heun, FLOW),
    "flow_dpmpp_2m": (grids.flow_dpm_path, solvers.dpmpp_2m, FLOW),
    "flow_dpmpp_2m_sd3": (grids.flow_path, solvers.dpmpp_2m_sd3, FLOW),
}
"""What a user names: a walk on the schedule, a solver's rule, and the predictions that it goes with."""


@dataclass(frozen=True, eq=False)
class Table:
    """The plan of a row: float64 columns of one length, read-only.

    init: the scale of the first noise, where a row starts from noise alone. start: where it starts from a source, the
    factors of that and of the noise. first: the step that it starts with.
    """

    t: Array
    c_in: Array
    xx: Array
    xo: Array
    xm: Array
    xz: Array
    zf: Array
    mx: Array
    mo: Array
    ka: Array
    kb: Array
    init: float
    start: tuple[float, float]
    first: int

    def __post_init__(self) -> None:
        for name in COLUMNS:
            getattr(self, name).setflags(write=False)

    @property
    def lines(self) -> int:
        """How many times the network is evaluated: n of n steps that run, or 2n - 1 for the heun solvers."""
        return len(self.t)

    def coefficients(self) -> npt.NDArray[np.float32]:
        """float32 [lines, len(COLUMNS)], in their order."""
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1).astype(np.float32)


def valid_pairs() -> tuple[tuple[str, str], ...]:
    """Every (sampler, prediction) that compiles."""
    return tuple((name, prediction) for name, (_, _, own) in SAMPLERS.items() for prediction in own)


def valid_samplers(schedule: Schedule) -> tuple[str, ...]:
    """The samplers that go with what this network predicts."""
    return tuple(name for name, prediction in valid_pairs() if prediction == schedule.prediction)


def valid_grids(sampler: str) -> tuple[str, ...]:
    """The grids that a sampler may walk in place of the card's own."""
    return tuple(grids.GRIDS) if SAMPLERS[sampler][0] in grids.GRIDDED else ()


def compile_table(
    schedule: Schedule,
    sampler: str,
    steps: int,
    *,
    tokens: int | None = None,
    strength: float | None = None,
    grid: str = "",
) -> Table:
    """The table of a row without a switch: see `compile_legs`."""
    (table,) = compile_legs(schedule, sampler, steps, tokens=tokens, strength=strength, grid=grid)
    assert table is not None  # else a strength that leaves no step has raised
    return table


def compile_legs(
    schedule: Schedule,
    sampler: str,
    steps: int,
    *,
    tokens: int | None = None,
    strength: float | None = None,
    switch_at: float | None = None,
    grid: str = "",
) -> tuple[Table | None, ...]:
    """The table of `steps` steps, or with a strength, of the last ones. With a switch there are two tables: of the
    steps before it and of those after it; one without steps is None.

    tokens: image tokens, for a resolution-dependent shift; ignored without one. strength: the share of the steps that
    run. switch_at: the share of the training steps after which another network goes on: `denoising_end` and
    `denoising_start` of pipeline_stable_diffusion_xl.py and its img2img. If the shift depends on the size, the smallest
    image decides, so that all sizes have equally many lines before the switch. grid: one of GRIDS, "" for the card's.

    Raises InvalidValue: param "sampler" or "schedule", naming the valid ones; "num_inference_steps", under 1 or more
    than the grid has room for; "strength", which leaves no step; "size", where the shift depends on it and tokens is
    None. CardError for betas that leave no signal.
    """
    return _compiled(at_size(schedule, tokens), sampler, steps, strength, switch_at, grid)


def first_step(steps: int, strength: float, prediction: str) -> int:
    """The step at which `strength` starts: `get_timesteps` of diffusers' img2img pipelines.

    NOTE: that of SD3 and FLUX keeps a fraction of a step, that of the others (SD, SDXL) drops it: 28 steps at 0.6 start
    at 11 or at 12.
    """
    wanted = steps * strength
    return int(max(steps - min(wanted if prediction in FLOW else int(wanted), steps), 0))


def at_size(schedule: Schedule, tokens: int | None) -> Schedule:
    """The schedule with `shift` set for an image of this many tokens; itself where the shift is static.

    pipeline_flux.py, `calculate_shift` (Esser et al. 2024, section 5.3.2). Raises InvalidValue when tokens is None.
    """
    line = schedule.dynamic_shift
    if line is None:
        return schedule
    if tokens is None:
        raise InvalidValue("this model's noise schedule depends on the image size, so it needs one", param="size")
    slope = (line.max - line.base) / (line.max_tokens - line.base_tokens)
    return schedule.model_copy(update={"shift": math.exp(line.base + slope * (tokens - line.base_tokens))})


@lru_cache(maxsize=256)
def most_steps(schedule: Schedule, sampler: str, limit: int) -> int:
    """The largest number of steps, at most `limit`, that this sampler has room for, on any grid; at least 1."""
    schedule, (walk, _, _) = at_size(schedule, 1), SAMPLERS[sampler]

    def is_over(steps: int) -> bool:
        try:
            walk(schedule, steps)
        except (InvalidValue, CardError):
            return True
        return False

    return limit if not is_over(limit) else max(1, bisect(range(1, limit), False, key=is_over))


@lru_cache(maxsize=1024)
def _compiled(
    schedule: Schedule, sampler: str, steps: int, strength: float | None, switch_at: float | None, grid: str
) -> tuple[Table | None, ...]:
    valid = valid_samplers(schedule)
    if sampler not in valid:
        raise InvalidValue(
            f'sampler: "{sampler}" does not go with this model, which predicts {schedule.prediction}; '
            f"valid: {', '.join(valid)}",
            param="sampler",
        )
    if grid and grid not in valid_grids(sampler):
        takers = ", ".join(name for name in valid if valid_grids(name))
        message = f'schedule: "{grid}" does not go with {sampler}; {", ".join(grids.GRIDS)} go with {takers}'
        raise InvalidValue(message, param="schedule")
    if steps < 1:
        raise InvalidValue(f"num_inference_steps: {steps} is under 1", param="num_inference_steps")
    walk, rule, _ = SAMPLERS[sampler]
    path, smallest = (walk(own, steps, grid) if grid else walk(own, steps) for own in (schedule, at_size(schedule, 1)))
    first = 0 if strength is None else first_step(steps, strength, schedule.prediction)
    if first == steps:
        message = f"strength: {strength:g} of {steps} steps leaves none to run"
        raise InvalidValue(message, param="strength")
    if switch_at is None:
        return (_between(schedule, rule, path, first, steps),)
    cutoff = round(schedule.train_steps - switch_at * schedule.train_steps)
    switch = max(first, int(np.count_nonzero(smallest.here.t >= cutoff)))
    return _between(schedule, rule, path, first, switch), _between(schedule, rule, path, switch, steps)


def _between(schedule: Schedule, rule: Rule, path: Path, start: int, stop: int) -> Table | None:
    """The table of these steps of a path; None where there are none. A rule begins anew at its start."""
    if start == stop:
        return None
    part, after = path[start:stop], path.here[stop:]
    then = (float(after.alpha[0]), float(after.sigma[0])) if len(after.t) else (1.0, 0.0)
    return compose(part, rule(part), schedule.prediction, start, then)


def compose(path: Path, lines: Lines, prediction: str, first: int = 0, then: tuple[float, float] = (1.0, 0.0)) -> Table:
    """The solver's lines with its x0 replaced by what the network gives.

    first: the step that the path starts with. then: (alpha, sigma) at which the network is asked after the path.
    """
    at, a, b, c, z, zf = lines
    p, q = PREDICTIONS[prediction](at.c_in * at.alpha, at.c_in * at.sigma)
    p = p * at.c_in
    start = float(at.alpha[0]), float(at.sigma[0])
    ka, kb = np.append(at.alpha[1:], then[0]), np.append(at.sigma[1:], then[1])
    return Table(at.t.copy(), at.c_in.copy(), a + b * p, b * q, c, z, zf, p, q, ka, kb, path.init, start, first)
