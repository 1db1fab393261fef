"""Solvers: rules that turn the points of a walk into the coefficients of its lines, all float64.

With x0 the clean latent predicted at a line and m the one of the line before, a line of every solver is

    x' = a * x + b * x0 + c * m + z * exp(zf / 2 * frac) * noise

where alpha, sigma belong to the point left (here) and alpha', sigma' to the point reached (there). frac, in [0, 1], is
the learned-variance channel of a network that has one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from app.samplers.grids import Array, Path, Points

Lines = tuple[Points, Array, Array, Array, Array, Array]
"""(the points at which the network is asked, a, b, c, z, zf): what a solver makes of a path."""

Rule = Callable[[Path], Lines]


def _first_order(here: Points, there: Points) -> tuple[Array, Array]:
    """(a, b) of the exact step for a constant x0: the noise shrinks by sigma' / sigma, x0 makes up the rest."""
    a = there.sigma / here.sigma
    return a, there.alpha - a * here.alpha


def first_order(path: Path) -> Lines:
    """DDIM at eta 0 (Song et al. 2021, eq. 12): scheduling_ddim.py. On an exploding path the same formula is Euler's
    (k-diffusion `sample_euler`): scheduling_euler_discrete.py; on a flow, scheduling_flow_match_euler_discrete.py.
    """
    a, b = _first_order(path.here, path.there)
    zero = np.zeros_like(a)
    return path.here, a, b, zero, zero, zero


def ddpm(path: Path) -> Lines:
    """The posterior q(x' | x, x0) (Ho et al. 2020, eq. 7), its variance fixed or learned (Nichol and Dhariwal 2021,
    eq. 15): scheduling_ddpm.py, and `p_mean_variance` and `p_sample` of the original DiT's gaussian_diffusion.py.

    NOTE: the last line adds noise too, as upstream, unless its t is 0: that of linspace, and of leading with no offset.
    """
    here, there = path.here, path.there
    keep = here.alpha / there.alpha
    beta = 1 - keep**2
    small = np.maximum(beta * there.sigma**2 / here.sigma**2, 1e-20)
    variance, zf = {
        "fixed_small": (small, np.zeros_like(beta)),
        "fixed_large": (beta, np.zeros_like(beta)),
        "learned_range": (small, np.log(beta / small)),
    }[path.variance]
    a = keep * there.sigma**2 / here.sigma**2
    b = there.alpha * beta / here.sigma**2
    z = np.where(here.t > 0, np.sqrt(variance), 0.0)
    return here, a, b, np.zeros_like(a), z, zf


def euler_ancestral(path: Path) -> Lines:
    """Euler to a lower noise level, then noise up to sigma' (k-diffusion `get_ancestral_step`, eta 1), on points with
    alpha = 1: scheduling_euler_ancestral_discrete.py.
    """
    here, there = path.here, path.there
    down = there.sigma**2 / here.sigma
    up = np.sqrt(there.sigma**2 - down**2)
    a = down / here.sigma
    zero = np.zeros_like(a)
    return here, a, 1 - a, zero, up, zero


def heun(path: Path) -> Lines:
    """The trapezoidal rule in sigma (Karras et al. 2022, alg. 1), where dx/dsigma = (x - x0) / sigma: for alpha = 1 and
    for alpha = 1 - sigma. scheduling_heun_discrete.py, scheduling_flow_match_heun_discrete.py.

    Two lines a step: Euler to the far point, and there a correction, since (x - x0) / sigma of the first line is
    (x' - m) / sigma'. A step to sigma' = 0 has no second line: n steps are 2 n - 1 lines.
    """
    here, there = path.here, path.there
    a, b = _first_order(here, there)
    noisy = there.sigma > 0
    c = (there.sigma - here.sigma) / (2 * np.where(noisy, there.sigma, 1.0))
    one, zero = np.ones_like(a), np.zeros_like(a)
    kept = np.stack([np.ones_like(noisy), noisy], axis=1)

    def woven(first: Array, second: Array) -> Array:
        return np.stack([first, second], axis=1)[kept]

    at = Points(*(woven(getattr(here, name), getattr(there, name)) for name in ("alpha", "sigma", "t", "c_in")))
    quiet = np.zeros_like(at.t)
    return at, woven(a, one), woven(b, -c), woven(zero, c), quiet, quiet


def dpmpp_2m(path: Path) -> Lines:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv 2211.01095, alg. 2), in lambda = log(alpha / sigma), half the
    log-SNR, for diffusion and flow alike: scheduling_dpmsolver_multistep.py.
    """
    return _two_step(path, first_order(path), path.here.log_snr, path.there.log_snr)


def dpmpp_2m_sde(path: Path) -> Lines:
    """SDE-DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv 2211.01095, appendix): each step goes down to sigma' k and
    adds noise up to sigma', where sigma / alpha shrinks by the factor k. scheduling_dpmsolver_multistep.py with
    "sde-dpmsolver++", `sample_dpmpp_2m_sde` of k-diffusion at eta 1.
    """
    here, there = path.here, path.there
    k = there.sigma / there.alpha * here.alpha / here.sigma
    zero = np.zeros_like(k)
    one = (here, there.sigma / here.sigma * k, there.alpha * (1 - k**2), zero, there.sigma * np.sqrt(1 - k**2), zero)
    return _two_step(path, one, here.log_snr, there.log_snr)


def lcm(path: Path) -> Lines:
    """Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378, alg. 3): x0 with as much fresh noise as the
    next step wants, none after the last. scheduling_lcm.py.

    NOTE: upstream's consistency function is c_skip x + c_out x0, at sigma_data 0.5 and ten times the timestep. c_skip
    is under 1e-5 from t = 19 on, so mem, which is x0, is upstream's `denoised` but for that.
    """
    here, there = path.here, path.there
    scaled = 10 * here.t
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    zero = np.zeros_like(scaled)
    return here, there.alpha * c_skip, there.alpha * c_out, zero, there.sigma, zero


def dpmpp_2m_sd3(path: Path) -> Lines:
    """The same in lambda = -log(sigma), on the points of a flow: `sample_dpmpp_2m` of sd3_impls.py in
    Stability-AI/sd3.5, which is k-diffusion's. Its first lambda is finite, so its second step has second order already.
    """
    with np.errstate(divide="ignore"):
        return _two_step(path, first_order(path), -np.log(path.here.sigma), -np.log(path.there.sigma))


def _two_step(path: Path, one: Lines, start: Array, end: Array) -> Lines:
    """Make second-order lines of the first-order lines `one`: x0 is extrapolated in lambda from the step before.

    start, end: lambda at both ends of each step. The first step stays first-order, and so does one to sigma' = 0.
    """
    at, a, b, _, z, zf = one
    ratio = np.zeros_like(a)
    ratio[1:] = (end[1:] - start[1:]) / (start[1:] - start[:-1])
    ratio[path.there.sigma == 0] = 0.0
    extra = b * ratio / 2
    return at, a, b + extra, -extra, z, zf
