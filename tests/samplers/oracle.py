"""The oracle of the sampler tests: a table run by its update rule, and diffusers' schedulers run in their own loop.

Latents are small float64 arrays, networks are formulas, noise is given. Both may start from a picture (Edit).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import (
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_lcm,
)

from app.samplers.grids import Array
from app.samplers.schedule import Schedule
from app.samplers.table import COLUMNS, Table
from tests.bench.upstream import PREDICTIONS as PREDICTION_TYPE
from tests.bench.upstream import SCHEDULERS as UPSTREAM

Network = Callable[[Array, float], Array]

START: dict[str, Any] = {
    "flow": diffusers.StableDiffusion3InpaintPipeline.get_timesteps,
    "diffusion": diffusers.StableDiffusionInpaintPipeline.get_timesteps,
}
"""What runs of a scheduler's timesteps, for a pipeline, a number of steps and a strength: by the kind of a schedule."""

SHAPE = (1, 2, 3, 4)
PLACE = np.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)


def network(x: Array, t: float) -> Array:
    """A smooth function of latent and timestep, not linear, and not the same in two places of the latent."""
    return 0.8 * np.tanh(0.7 * x + math.sin(t / 150) + PLACE) + 0.2 * math.cos(t / 60) * x


def channel(x: Array, t: float) -> Array:
    """The variance channel of the same network, in [-1, 1]."""
    return np.sin(3 * x + t / 90)


def draw(lines: int) -> Array:
    """The first noise, and one for each line."""
    return np.random.default_rng(0).standard_normal((lines + 1, *SHAPE))


@dataclass(frozen=True)
class Edit:
    """A start from a picture. image: its latent. mask: bool, True where that is drawn anew; None is everywhere."""

    image: torch.Tensor
    strength: float
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Later:
    """A start in the middle of a loop, where another network goes on: the latent, and how many steps have run."""

    latent: torch.Tensor
    steps: int


@dataclass
class Run:
    """A finished loop: the latent after each line, and the clean latent predicted at each."""

    states: list[Array]
    clean: list[Array]

    @property
    def final(self) -> Array:
        return self.states[-1]


def run_table(
    table: Table, net: Network, noise: Array, kind: type[np.floating[Any]] = np.float64, edit: Edit | None = None
) -> Run:
    """The update rule at the head of app/samplers/table.py; in float32 with the coefficients that the engine gets."""
    rows = np.stack([getattr(table, name) for name in COLUMNS], axis=1)
    rows = rows if kind is np.float64 else table.coefficients()
    from_image, from_noise, blend = 0.0, table.init, lambda x, ka, kb: x
    image = edit.image.numpy() if edit else np.zeros(SHAPE)
    if edit and (edit.mask is None or edit.strength < 1):
        from_image, from_noise = table.start
    if edit and edit.mask is not None:
        blend = lambda x, ka, kb: np.where(edit.mask.numpy(), x, (ka * image + kb * noise[0]).astype(kind))  # noqa: E731
    x, mem, run = (from_image * image + from_noise * noise[0]).astype(kind), np.zeros(SHAPE, kind), Run([], [])
    for (t, c_in, xx, xo, xm, xz, zf, mx, mo, ka, kb), fresh in zip(rows, noise[1:].astype(kind), strict=True):
        out = net(c_in * x, float(t)).astype(kind)
        scale = xz * np.exp(0.5 * zf * (channel(c_in * x, float(t)).astype(kind) + 1) / 2) if xz else kind(0)
        x, mem = blend(xx * x + xo * out + xm * mem + scale * fresh, ka, kb), mx * x + mo * out
        run.states.append(x)
        run.clean.append(mem)
    assert x.dtype == mem.dtype == kind
    return run


@contextmanager
def wide() -> Iterator[None]:
    """Upstream's own code, in float64.

    The schedulers sum their alphas, keep their sigmas and cast the latent in float32. With linear betas 1 - alpha-bar
    is 1e-4 at t = 0, there with an error of 6e-8, so the smallest sigmas are wrong in their fourth digit; and a long
    Euler step from sigma 157 to 0.01 leaves five digits of the latent. Their formulas are the oracle, not that.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in {sys.modules[scheduler.__module__] for scheduler in UPSTREAM.values()}:
            for name, library in (("torch", torch), ("np", np)):
                patch.setattr(module, name, SimpleNamespace(**{**vars(library), "float32": library.float64}))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def diffusion_scheduler(schedule: Schedule, sampler: str, prediction: str, grid: str = "") -> Any:
    """diffusers' scheduler for a diffusion schedule, with those grids that it knows itself."""
    options: dict[str, Any] = {
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.betas,
        "prediction_type": PREDICTION_TYPE[prediction],
        "timestep_spacing": schedule.spacing,
        "steps_offset": schedule.steps_offset,
        **{
            "ddim": {"clip_sample": False, "set_alpha_to_one": schedule.set_alpha_to_one},
            "ddpm": {"clip_sample": False, "variance_type": schedule.variance},
            "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
        }.get(sampler, {}),
        **({f"use_{grid}_sigmas": True} if grid in KNOWN_GRIDS and sampler != "euler_ancestral" else {}),
    }
    return UPSTREAM[sampler](**options)


KNOWN_GRIDS = ("karras", "exponential")
"""Grids that diffusers has too."""


def sgm_uniform(scheduler: Any, steps: int) -> tuple[Array, Array]:
    """(timesteps, sigmas) of `sgm_uniform` in A1111's sd_schedulers.py, through k-diffusion's DiscreteSchedule."""
    log_sigmas = np.log((1 - scheduler.alphas_cumprod.numpy()) / scheduler.alphas_cumprod.numpy()) / 2
    t = np.linspace(len(log_sigmas) - 1, 0, steps + 1)[:-1]
    low, w = np.floor(t).astype(int), t - np.floor(t)
    return t, np.exp((1 - w) * log_sigmas[low] + w * log_sigmas[np.ceil(t).astype(int)])


def set_steps(scheduler: Any, schedule: Schedule, sampler: str, steps: int, grid: str = "") -> Any:
    """The scheduler with its timesteps set; on a grid that it does not know, as diffusers' Euler walks it."""
    scheduler.set_timesteps(steps)
    if grid == "sgm_uniform" and "dpmpp" in sampler:
        t, sigma = sgm_uniform(scheduler, steps)
        scheduler.timesteps, scheduler.sigmas = torch.from_numpy(t), torch.from_numpy(np.append(sigma, 0))
    elif grid == "sgm_uniform" or (grid and sampler == "euler_ancestral"):
        euler = diffusion_scheduler(schedule, "euler", schedule.prediction, grid)
        if grid in KNOWN_GRIDS:
            euler.set_timesteps(steps)
        else:
            euler.set_timesteps(sigmas=[*sgm_uniform(euler, steps)[1].tolist(), 0.0])
        _follow(scheduler, euler)
    return scheduler


def _follow(scheduler: Any, euler: Any) -> None:
    """Let a scheduler walk the points of an Euler; a Heun lists all but the first twice."""
    s, t = euler.sigmas, euler.timesteps
    if scheduler.order == 2:
        s, t = (
            torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]]),
            torch.cat([t[:1], t[1:].repeat_interleave(2)]),
        )
    scheduler.sigmas, scheduler.timesteps = s, t


def flow_scheduler(schedule: Schedule, sampler: str, steps: int, mu: float, grid: str = "") -> Any:
    """diffusers' scheduler for a flow schedule, as the SD3 and the FLUX pipeline set it; mu is the log of the shift."""
    dynamic = schedule.dynamic_shift is not None
    if sampler == "flow_dpmpp_2m":
        scheduler = UPSTREAM[sampler](
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=schedule.shift,
            use_dynamic_shifting=dynamic,
        )
        scheduler.set_timesteps(steps, **({"mu": mu} if dynamic else {}))
        return scheduler
    own = {f"use_{grid}_sigmas": True} if grid in KNOWN_GRIDS else {}
    euler = UPSTREAM["flow_euler"](shift=schedule.shift, use_dynamic_shifting=dynamic, **own)
    sigmas = np.linspace(1, 1 / steps, steps) if schedule.spacing == "flux" else None
    if grid == "sgm_uniform":  # ComfyUI's ends are the sigmas of SD3's first and last training step
        sigmas = np.linspace(1, euler.sigma_min, steps + 1)[:-1]
    euler.set_timesteps(None if sigmas is not None else steps, sigmas=sigmas, mu=mu)
    if sampler == "flow_euler":
        return euler
    heun = UPSTREAM["flow_heun"](shift=schedule.shift)
    heun.set_timesteps(steps)
    if schedule.spacing == "flux" or dynamic or grid:  # upstream's heun knows SD3's static grid only
        _follow(heun, euler)
    return heun


def begin(
    scheduler: Any, noise: torch.Tensor, edit: Edit | Later | None
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor, int], torch.Tensor]]:
    """The timesteps that run, the latent before the first of them, and what a mask makes of the latent after each.

    As pipeline_stable_diffusion_3_inpaint.py and pipeline_stable_diffusion_xl_inpaint.py have it. noise: the first.
    """
    if isinstance(edit, Later):  # `denoising_start` of pipeline_stable_diffusion_xl_img2img.py
        index = edit.steps * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(index)
        return scheduler.timesteps[index:], edit.latent, lambda x, step: x
    init = getattr(scheduler, "init_noise_sigma", 1.0)
    if edit is None:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler.timesteps, noise * init, lambda x, step: x
    flow = hasattr(scheduler, "scale_noise") or getattr(scheduler.config, "use_flow_sigmas", False)
    pipeline, steps = SimpleNamespace(scheduler=scheduler), scheduler.num_inference_steps
    timesteps, _ = START["flow" if flow else "diffusion"](pipeline, steps, edit.strength, None)

    def noisy(at: torch.Tensor) -> torch.Tensor:
        if not len(at):
            return edit.image
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(edit.image, at, noise)
        return scheduler.add_noise(edit.image, noise, at)

    if edit.mask is None:
        return timesteps, noisy(timesteps[:1]), lambda x, step: x
    start = noise * init if edit.strength == 1 else noisy(timesteps[:1])
    return timesteps, start, lambda x, step: torch.where(edit.mask, x, noisy(timesteps[step + 1 : step + 2]))


NOISY = (
    scheduling_ddpm,
    scheduling_euler_ancestral_discrete,
    scheduling_dpmsolver_multistep,
    scheduling_lcm,
)
"""Modules of the schedulers that add noise."""


def run_upstream(
    scheduler: Any,
    net: Network,
    noise: Sequence[Array],
    learned: bool = False,
    edit: Edit | Later | None = None,
    stop: int | None = None,
) -> Run:
    """The loop of a diffusers pipeline, on a scheduler whose timesteps are set, with the noise of each step given.

    stop: the step before which it ends, as `denoising_end` of pipeline_stable_diffusion_xl.py.
    """
    timesteps, x, blend = begin(scheduler, torch.from_numpy(noise[0]), edit)
    timesteps = timesteps if stop is None else timesteps[: stop * scheduler.order]
    run = Run([], [])
    with pytest.MonkeyPatch.context() as patch:
        given: list[Array] = []
        for module in NOISY:
            patch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(given[-1]))
        for number, (t, fresh) in enumerate(zip(timesteps, noise[1:], strict=True)):
            given.append(fresh)
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = torch.from_numpy(net(seen.double().numpy(), float(t)))
            full = torch.cat([out, torch.from_numpy(channel(seen.numpy(), float(t)))], dim=1) if learned else out
            step = scheduler.step(full, t, x)
            run.clean.append(_predicted(scheduler, step, x, out, t).numpy())
            x = blend(step.prev_sample, number)
            run.states.append(x.numpy())
    return run


def _predicted(scheduler: Any, step: Any, x: torch.Tensor, out: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The clean latent that upstream predicted in this step."""
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        return scheduler.model_outputs[-1]
    if isinstance(scheduler, diffusers.LCMScheduler):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return (step.denoised - c_skip * x) / c_out
    if "FlowMatch" in type(scheduler).__name__:
        return x - scheduler.sigmas[scheduler.step_index - 1] * out
    return step.pred_original_sample
