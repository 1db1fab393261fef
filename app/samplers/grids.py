"""Grids: from a card's Schedule and a number of steps to the walk of a sampler, in float64.

The grids are those of diffusers' schedulers, file by file: a checkpoint is tuned, and a turbo distilled, on its grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from app.errors import CardError, InvalidValue
from app.samplers.schedule import Schedule

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Noise levels along a walk, arrays of one length: the state there is x = alpha * clean + sigma * noise.

    The network, asked at timestep t, takes c_in * x.
    """

    alpha: Array
    sigma: Array
    t: Array
    c_in: Array

    def __getitem__(self, index: slice) -> Points:
        return Points(self.alpha[index], self.sigma[index], self.t[index], self.c_in[index])

    @property
    def log_snr(self) -> Array:
        """log(alpha / sigma): half the logarithm of the signal-to-noise ratio; -inf for pure noise, inf for none."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.alpha) - np.log(self.sigma))


@dataclass(frozen=True)
class Path:
    """A walk: step i goes from here[i] to there[i]. init: scale of the first noise. variance: what ddpm adds back."""

    here: Points
    there: Points
    init: float = 1.0
    variance: str = "fixed_small"

    def __getitem__(self, steps: slice) -> Path:
        return replace(self, here=self.here[steps], there=self.there[steps])


Walk = Callable[..., Path]
"""(schedule, steps) -> the path of so many steps; those of GRIDDED also take the name of a grid. Raises
InvalidValue(param="num_inference_steps") when the steps do not fit the card's own spacing, whichever the grid."""

# ---- diffusion: alpha-bar from betas -------------------------------------------------------------------------------

LCM_STEPS = 50  # original_inference_steps of scheduling_lcm.py

BETAS: dict[str, Callable[[float, float, int], Array]] = {
    "linear": lambda start, end, count: np.linspace(start, end, count),
    "scaled_linear": lambda start, end, count: np.linspace(start**0.5, end**0.5, count) ** 2,
}


def alpha_bar(schedule: Schedule) -> Array:
    """The share of signal in the variance at each training step, [train_steps] (Ho et al. 2020, eq. 4).

    Raises CardError when nothing is left of the signal at the last step: such a network has no clean latent to predict.
    """
    betas = BETAS[schedule.betas](schedule.beta_start, schedule.beta_end, schedule.train_steps)
    bar = np.cumprod(1 - betas, dtype=np.float64)
    if bar[-1] < np.finfo(np.float32).tiny:
        raise CardError("schedule: these betas leave no signal at the last training step (zero signal-to-noise ratio)")
    return bar


def _respaced(schedule: Schedule, steps: int) -> Array:
    # NOTE: upstream adds its stride step by step and rounds the sums, so halves fall where their rounding errors say.
    # linspace differs from it at 278 of the counts from 2 to 1000. cumsum adds in the same order.
    stride = (schedule.train_steps - 1) / max(steps - 1, 1)
    return np.cumsum([0.0] + [stride] * (steps - 1)).round()[::-1]


def _levels(schedule: Schedule) -> Array:
    """sigma / alpha at each training step, [train_steps], rising."""
    bar = alpha_bar(schedule)
    return np.asarray(np.sqrt((1 - bar) / bar))


def _at_level(levels: Array, level: Array) -> Array:
    """The timesteps of these levels, whole or not: `_sigma_to_t` of diffusers, linear in the logarithm of the level."""
    return np.interp(np.log(level), np.log(levels), np.arange(len(levels)))


def _sgm_uniform(schedule: Schedule, own: Array, steps: int) -> Array:
    levels = _levels(schedule)
    t = np.linspace(schedule.train_steps - 1, 0, steps + 1)[:-1]
    return np.asarray(np.exp(np.interp(t, np.arange(len(levels)), np.log(levels))))


GRIDS: dict[str, Callable[[Schedule, Array, int], Array]] = {
    "karras": lambda schedule, own, steps: np.linspace(own[0] ** (1 / 7), own[-1] ** (1 / 7), steps) ** 7,
    "exponential": lambda schedule, own, steps: np.geomspace(own[0], own[-1], steps),
    "sgm_uniform": _sgm_uniform,
}
"""Descending levels sigma / alpha, [steps], that any card may walk in place of its own spacing.

own: descending levels; the first two go from the first of them to the last. karras: Karras et al. 2022, eq. 5, at rho
7. exponential: even in the logarithm. sgm_uniform: even in time, with the whole of the last stride left for the end:
modules/sd_schedulers.py of AUTOMATIC1111/stable-diffusion-webui.
"""

SPACINGS: dict[str, Callable[[Schedule, int], Array]] = {
    "leading": lambda own, steps: (
        np.arange(steps, dtype=np.float64)[::-1] * (own.train_steps // steps) + own.steps_offset
    ),
    "linspace": lambda own, steps: np.linspace(0, own.train_steps - 1, steps, dtype=np.float64)[::-1],
    # NOTE: at some counts (61 of 1000) rounding gives arange one element too many, upstream too: a step to t = -1.
    "trailing": lambda own, steps: np.arange(own.train_steps, 0, -own.train_steps / steps)[:steps].round() - 1,
    "respaced": _respaced,
}
"""Descending timesteps, [steps]; those of linspace need not be whole (Lin et al. 2023, arXiv 2305.08891, table 2).

respaced is `space_timesteps` of respace.py in facebookresearch/DiT, first in openai/improved-diffusion.
"""


def _preserving(schedule: Schedule, t: Array, after: float = 1.0) -> Points:
    """Variance-preserving points, alpha^2 + sigma^2 = 1, at whole timesteps; t = -1 is the end, alpha-bar `after`."""
    bar = np.append(alpha_bar(schedule), after)[t.astype(np.intp)]
    return Points(np.sqrt(bar), np.sqrt(1 - bar), t, np.ones_like(bar))


def _chain(schedule: Schedule, t: Array) -> Path:
    """From each timestep to the next, and from the last to the clean end."""
    return Path(_preserving(schedule, t), _preserving(schedule, np.append(t[1:], -1.0)), variance=schedule.variance)


def ddpm_path(schedule: Schedule, steps: int) -> Path:
    """scheduling_ddpm.py; with respaced, `p_sample_loop` of the original DiT after `create_diffusion(str(steps))`."""
    return _chain(schedule, _fit(schedule, steps, SPACINGS[schedule.spacing](schedule, steps).round()))


def ddim_path(schedule: Schedule, steps: int) -> Path:
    """scheduling_ddim.py; with respaced, `ddim_sample_loop` of the original DiT, which steps to the next timestep.

    NOTE: the former steps to t - train_steps // steps, which need not be the next timestep.
    """
    t = _fit(schedule, steps, SPACINGS[schedule.spacing](schedule, steps).round())
    after = 1.0 if schedule.set_alpha_to_one else alpha_bar(schedule)[0]
    respaced, stride = schedule.spacing == "respaced", schedule.train_steps // steps
    to = np.append(t[1:], -1.0) if respaced else np.maximum(t - stride, -1.0)
    return Path(_preserving(schedule, t), _preserving(schedule, to, after))


def lcm_path(schedule: Schedule, steps: int) -> Path:
    """scheduling_lcm.py: some of the 50 timesteps that latent consistency models are distilled on, whatever the card's
    spacing."""
    taken = np.floor(np.linspace(0, LCM_STEPS, steps, endpoint=False))
    return _chain(schedule, _fit(schedule, steps, (LCM_STEPS - taken) * max(schedule.train_steps // LCM_STEPS, 1) - 1))


_WHOLE: dict[str, Callable[[Array], Array]] = {"karras": np.round, "exponential": lambda t: np.floor(t + 1e-9)}


def dpm_path(schedule: Schedule, steps: int, grid: str = "") -> Path:
    """scheduling_dpmsolver_multistep.py. NOTE: all but trailing lay steps + 1 points and leave out the last.

    A grid spans all training steps here, whatever the spacing. NOTE: upstream rounds the timesteps of karras and cuts
    those of exponential to whole numbers; in float32 it may cut the first one, which is whole, to one less.
    """
    points = steps if schedule.spacing == "trailing" else steps + 1
    t = _fit(schedule, steps, SPACINGS[schedule.spacing](schedule, points)[:steps].round())
    if not grid:
        return _chain(schedule, t)
    levels = _levels(schedule)
    sigma = np.append(GRIDS[grid](schedule, levels[::-1], steps), 0.0)
    t = _WHOLE.get(grid, np.asarray)(_at_level(levels, sigma[:-1]))
    alpha = 1 / np.sqrt(1 + sigma**2)
    reached = Points(alpha, alpha * sigma, np.append(t, -1.0), np.ones_like(alpha))
    return Path(reached[:-1], reached[1:])


def exploding_path(schedule: Schedule, steps: int, grid: str = "") -> Path:
    """Variance-exploding points, alpha = 1 (Karras et al. 2022, eq. 199): the Euler and Heun schedulers of diffusers.

    Between whole timesteps sigma, not its logarithm, is interpolated. karras and exponential start
    and end where the card's spacing does.
    """
    t, levels = _fit(schedule, steps, SPACINGS[schedule.spacing](schedule, steps)), _levels(schedule)
    sigma = np.interp(t, np.arange(len(levels)), levels)
    if grid:
        sigma = GRIDS[grid](schedule, sigma, steps)
        t = _at_level(levels, sigma)
    sigma = np.append(sigma, 0.0)
    points = Points(np.ones_like(sigma), sigma, np.append(t, 0.0), 1 / np.sqrt(1 + sigma**2))
    init = math.hypot(sigma[0], 1) if schedule.spacing == "leading" else sigma[0]
    return Path(points[:-1], points[1:], init=float(init))


# ---- rectified flow: sigma is the time itself ----------------------------------------------------------------------


def shifted(sigma: Array, shift: float) -> Array:
    """The noise level moved towards pure noise by `shift` (Esser et al. 2024, eq. 23); never past it, by rounding."""
    return np.minimum(shift * sigma / (1 + (shift - 1) * sigma), 1.0)


def _sd3(schedule: Schedule, steps: int) -> Array:
    # NOTE: a static shift is applied to the ends of the grid, and then to the whole of it; a dynamic one only once.
    ends = np.array([1, 1 / schedule.train_steps])
    if schedule.dynamic_shift is None:
        ends = shifted(ends, schedule.shift)
    return shifted(np.linspace(ends[0], ends[1], steps), schedule.shift)


FLOW_SPACINGS: dict[str, Callable[[Schedule, int], Array]] = {
    "sd3": _sd3,
    "flux": lambda own, steps: shifted(np.linspace(1, 1 / steps, steps), own.shift),
}
"""Descending sigmas, [steps]: scheduling_flow_match_euler_discrete.py alone, and as pipeline_flux.py calls it."""


def _straight(schedule: Schedule, sigma: Array, t: Array) -> Path:
    """From each sigma to the next, and from the last to 0, on x = (1 - sigma) clean + sigma noise."""
    sigma, t = np.append(sigma, 0.0), np.append(t, 0.0)
    points = Points(1 - sigma, sigma, t, np.ones_like(sigma))
    return Path(points[:-1], points[1:])


FLOW_GRIDS = GRIDS | {"sgm_uniform": lambda schedule, own, steps: _sd3(schedule, steps + 1)[:-1]}
"""The same for flows, in sigma itself; sgm_uniform is `normal_scheduler` of comfy/samplers.py in ComfyUI for SD3."""


def flow_path(schedule: Schedule, steps: int, grid: str = "") -> Path:
    """scheduling_flow_match_euler_discrete.py, and its Heun: the card's spacing, or a grid between its ends."""
    sigma = _fit(schedule, steps, FLOW_SPACINGS[schedule.spacing](schedule, steps))
    if grid:
        sigma = FLOW_GRIDS[grid](schedule, sigma, steps)
    return _straight(schedule, sigma, sigma * schedule.train_steps)


def flow_dpm_path(schedule: Schedule, steps: int) -> Path:
    """scheduling_dpmsolver_multistep.py with use_flow_sigmas: one grid of its own, whichever spacing the card names.

    It is FLUX's but for its start, 1 - 1 / train_steps, where the log-SNR is finite.
    NOTE: upstream cuts its timesteps to whole numbers, so sigma is computed by upstream's own arithmetic, in its order.
    """
    sigma = 1.0 - np.linspace(1, 1 / schedule.train_steps, steps + 1)
    sigma = _fit(schedule, steps, shifted(sigma, schedule.shift)[:0:-1])
    return _straight(schedule, sigma, np.floor(sigma * schedule.train_steps))


GRIDDED: tuple[Walk, ...] = (dpm_path, exploding_path, flow_path)
"""The walks that take another grid. The others step between whole training steps."""


def _fit(schedule: Schedule, steps: int, grid: Array) -> Array:
    """The grid itself, if it falls at every step and starts inside the training steps; else raises InvalidValue."""
    if np.any(np.diff(grid) >= 0) or grid[0] > schedule.train_steps - 1:
        raise InvalidValue(
            f"num_inference_steps: {steps} steps do not fit the {schedule.train_steps} training steps of this model "
            f"with {schedule.spacing} spacing and this sampler",
            param="num_inference_steps",
        )
    return grid
