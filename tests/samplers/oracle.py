"""The oracle of the sampler tests: a table run by its update rule, and diffusers' schedulers run in their own loop.

Latents are small float64 arrays, networks are formulas, noise is given.
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
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete

from app.samplers.grids import Array
from app.samplers.schedule import Schedule
from app.samplers.table import COLUMNS, Table
from tests.bench.upstream import PREDICTIONS as PREDICTION_TYPE
from tests.bench.upstream import SCHEDULERS as UPSTREAM

Network = Callable[[Array, float], Array]

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


@dataclass
class Run:
    """A finished loop: the final latent, and the clean latent predicted at each line."""

    final: Array
    clean: list[Array]


def run_table(table: Table, net: Network, noise: Array, kind: type[np.floating[Any]] = np.float64) -> Run:
    """The update rule at the head of app/samplers/table.py; in float32 with the coefficients that the engine gets."""
    rows = np.stack([getattr(table, name) for name in COLUMNS], axis=1)
    rows = rows if kind is np.float64 else table.coefficients()
    x, mem, clean = (kind(table.init) * noise[0]).astype(kind), np.zeros(SHAPE, kind), []
    for (t, c_in, xx, xo, xm, xz, zf, mx, mo), fresh in zip(rows, noise[1:].astype(kind), strict=True):
        out = net(c_in * x, float(t)).astype(kind)
        scale = xz * np.exp(0.5 * zf * (channel(c_in * x, float(t)).astype(kind) + 1) / 2) if xz else kind(0)
        x, mem = xx * x + xo * out + xm * mem + scale * fresh, mx * x + mo * out
        clean.append(mem)
    assert x.dtype == mem.dtype == kind
    return Run(x, clean)


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
        yield


def diffusion_scheduler(schedule: Schedule, sampler: str, prediction: str) -> Any:
    """diffusers' scheduler for a diffusion schedule."""
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
        }.get(sampler, {}),
    }
    return UPSTREAM[sampler](**options)


def flow_scheduler(schedule: Schedule, sampler: str, steps: int, mu: float) -> Any:
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
    euler = UPSTREAM["flow_euler"](shift=schedule.shift, use_dynamic_shifting=dynamic)
    sigmas = np.linspace(1, 1 / steps, steps) if schedule.spacing == "flux" else None
    euler.set_timesteps(None if sigmas is not None else steps, sigmas=sigmas, mu=mu)
    if sampler == "flow_euler":
        return euler
    heun = UPSTREAM["flow_heun"](shift=schedule.shift)
    heun.set_timesteps(steps)
    if schedule.spacing == "flux" or dynamic:  # upstream's heun knows SD3's static grid only: it walks euler's here
        s, t = euler.sigmas, euler.timesteps
        heun.sigmas = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
        heun.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])
    return heun


def run_upstream(scheduler: Any, net: Network, noise: Sequence[Array], learned: bool = False) -> Run:
    """The loop of a diffusers pipeline, on a scheduler whose timesteps are set, with the noise of each step given."""
    x, clean = torch.from_numpy(noise[0]) * getattr(scheduler, "init_noise_sigma", 1.0), []
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    with pytest.MonkeyPatch.context() as patch:
        given: list[Array] = []
        for module in (scheduling_ddpm, scheduling_euler_ancestral_discrete):
            patch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(given[-1]))
        for t, fresh in zip(scheduler.timesteps, noise[1:], strict=True):
            given.append(fresh)
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = torch.from_numpy(net(seen.double().numpy(), float(t)))
            full = torch.cat([out, torch.from_numpy(channel(seen.numpy(), float(t)))], dim=1) if learned else out
            step = scheduler.step(full, t, x)
            clean.append(_predicted(scheduler, step, x, out).numpy())
            x = step.prev_sample
    return Run(x.numpy(), clean)


def _predicted(scheduler: Any, step: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The clean latent that upstream predicted in this step."""
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        return scheduler.model_outputs[-1]
    if "FlowMatch" in type(scheduler).__name__:
        return x - scheduler.sigmas[scheduler.step_index - 1] * out
    return step.pred_original_sample
