"""The rules of app/samplers/solvers.py against what is known in closed form: no scheduler takes part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from app.errors import InvalidValue
from app.samplers import solvers
from app.samplers.grids import Path, Points
from app.samplers.schedule import Schedule
from app.samplers.table import SAMPLERS, compile_table, compose, valid_grids, valid_samplers
from tests.parts.close import EXACT, SAME, apart, close, furthest, relative
from tests.samplers.oracle import PLACE, Array, channel, draw, network, run_table
from tests.seeds.plain_dit import respaced

CALM = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

GEOMETRIES = {
    "preserving": lambda u: (np.cos(1.45 - 1.35 * u), np.sin(1.45 - 1.35 * u)),
    "exploding": lambda u: (np.ones_like(u), 20 * 400**-u),
    "flow": lambda u: (0.02 + 0.93 * u, 0.98 - 0.93 * u),
}
"""(alpha, sigma) of smooth walks, from u = 0 near pure noise to u = 1, still some way from the clean end."""


def smooth_path(geometry: str, steps: int) -> Path:
    t = np.linspace(0, 1, steps + 1)
    alpha, sigma = GEOMETRIES[geometry](t)
    c_in = 1 / np.hypot(alpha, sigma) if geometry == "exploding" else np.ones_like(t)
    points = Points(alpha, sigma, t, c_in)
    return Path(points[:-1], points[1:])


class Gaussian:
    """Data from N(mean, deviation^2): its best prediction, and where its probability-flow ODE leads, are known."""

    mean, deviation = PLACE, 0.4

    def answer(self, x: Array, geometry: str) -> Array:
        """x at u = 0 carried to u = 1: x keeps its place in units of the marginal's deviation."""
        alpha, sigma = GEOMETRIES[geometry](np.array([0.0, 1.0]))
        width = np.hypot(alpha * self.deviation, sigma)
        return alpha[1] * self.mean + width[1] / width[0] * (x - alpha[0] * self.mean)

    def network(self, geometry: str, prediction: str):
        def best(seen: Array, t: float) -> Array:
            alpha, sigma = (level.item() for level in GEOMETRIES[geometry](np.array([t])))
            alpha, sigma = (
                level / (np.hypot(alpha, sigma) if geometry == "exploding" else 1) for level in (alpha, sigma)
            )
            gain = alpha * self.deviation**2 / ((alpha * self.deviation) ** 2 + sigma**2)
            x0 = self.mean + gain * (seen - alpha * self.mean)
            noise = (seen - alpha * x0) / sigma
            return {"epsilon": noise, "v": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[prediction]

        return best


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
@pytest.mark.parametrize(
    ("rule", "geometry", "order"),
    [
        (solvers.first_order, "preserving", 1),  # ddim
        (solvers.first_order, "exploding", 1),  # euler
        (solvers.first_order, "flow", 1),  # flow_euler
        (solvers.heun, "exploding", 2),
        (solvers.heun, "flow", 2),
        (solvers.dpmpp_2m, "preserving", 2),
        (solvers.dpmpp_2m, "flow", 2),
        (solvers.dpmpp_2m_sd3, "flow", 2),
        (solvers.dpmpp_2m_sd3, "exploding", 2),
    ],
)
def test_deterministic_solvers_converge_at_their_order(rule, geometry, order, prediction):
    if (prediction == "flow") != (geometry == "flow"):
        prediction = {"flow": "epsilon"}.get(prediction, "flow")
    gaussian, errors = Gaussian(), []
    for steps in (64, 128, 256):
        path = smooth_path(geometry, steps)
        table = compose(path, rule(path), prediction)
        noise = draw(table.lines)
        final = run_table(table, gaussian.network(geometry, prediction), noise).final
        errors.append(relative(final, gaussian.answer(noise[0], geometry)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.05
    np.testing.assert_allclose(orders, order, atol=0.15)


@st.composite
def requests(draw):
    """A schedule of either kind, a solver that goes with it, a number of steps, and a grid that the solver may walk."""
    kind = draw(st.sampled_from(["diffusion", "flow"]))
    spacings = {"diffusion": ["leading", "linspace", "trailing", "respaced"], "flow": ["sd3", "flux"]}[kind]
    schedule = Schedule(
        kind=kind,
        prediction={"diffusion": "epsilon", "flow": "flow"}[kind],
        spacing=draw(st.sampled_from(spacings)),
        train_steps=draw(st.integers(2, 1500)),
        betas=draw(st.sampled_from(["linear", "scaled_linear"])),
        beta_end=draw(st.floats(2e-3, 3e-2)),
        steps_offset=draw(st.integers(0, 1)),
        set_alpha_to_one=draw(st.booleans()),
        shift=draw(st.floats(0.3, 8)),
    )
    name = draw(st.sampled_from(valid_samplers(schedule)))
    return schedule, name, draw(st.integers(1, 60)), draw(st.sampled_from(["", *valid_grids(name)]))


@CALM
@given(requests())
def test_every_line_keeps_the_marginal_of_a_network_that_knows(request):
    """When x0 is known at every line, a state alpha * x0 + sigma * noise lands on the noise level the walk names."""
    schedule, name, steps, grid = request
    assume(name != "lcm")  # its consistency function is not x0 near t = 0
    walk, rule, _ = SAMPLERS[name]
    try:
        path = walk(schedule, steps, grid) if grid else walk(schedule, steps)
    except InvalidValue:
        assume(False)
    at, a, b, c, z, _ = rule(path)
    landing = path.there  # ddim's is not where its next line starts; heun has two lines a step
    alpha = landing.alpha if name == "ddim" else np.append(at.alpha[1:], landing.alpha[-1])
    sigma = landing.sigma if name == "ddim" else np.append(at.sigma[1:], landing.sigma[-1])
    close(a * at.alpha + b + c, alpha, EXACT, furthest)
    # NOTE: of no noise ddpm makes 1e-10, the root of the least variance that upstream allows.
    close(np.append(np.hypot(a * at.sigma, z), 1.0), np.append(sigma, 1.0), 1e-8, furthest)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_line_with_a_thousandth_more_of_x0_does_not(sampler):
    walk, rule, _ = SAMPLERS[sampler]
    at, a, b, c, _, _ = rule(walk(Schedule(kind="flow" if "flow" in sampler else "diffusion"), 10))
    right = a * at.alpha + b + c
    apart(right + 0.001 * b, right, 1e-8, furthest)


@CALM
@given(requests())
def test_every_table_is_finite_also_in_float32(request):
    schedule, name, steps, grid = request
    try:
        table = compile_table(schedule, name, steps, grid=grid)
    except InvalidValue:
        assume(False)
    assert np.isfinite(table.coefficients()).all() and np.isfinite(table.init)


def original_dit(betas: Array, steps: int, noise: Array) -> Array:
    """The sampling loop of facebookresearch/DiT with learned sigma, derived again from its equations, in float64.

    respace.py keeps evenly spaced timesteps of the chain and gives it the betas that join them; gaussian_diffusion.py
    takes the posterior mean at the x0 of the predicted noise, and a log variance between that of the posterior (the
    lower bound) and that of the betas, by the network's other half. t counts kept steps; the network sees the true one.
    """
    kept = respaced(steps)
    bar = np.cumprod(1 - betas)[kept]
    before = np.append(1.0, bar[:-1])
    beta = 1 - bar / before
    posterior = beta * (1 - before) / (1 - bar)
    x = noise[0]
    for t, fresh in zip(reversed(range(len(kept))), noise[1:], strict=True):
        eps, fraction = network(x, kept[t]), (channel(x, kept[t]) + 1) / 2
        x0 = np.sqrt(1 / bar[t]) * x - np.sqrt(1 / bar[t] - 1) * eps
        mean = np.sqrt(before[t]) * beta[t] * x0 + np.sqrt(1 - beta[t]) * (1 - before[t]) * x
        x = mean / (1 - bar[t])
        if t > 0:
            x = x + np.exp(0.5 * (fraction * np.log(beta[t]) + (1 - fraction) * np.log(posterior[t]))) * fresh
    return x


def original_dit_ddim(betas: Array, steps: int, noise: Array) -> Array:
    """`ddim_sample_loop` at eta 0: the clean latent and the noise of a step, joined at the next kept one."""
    kept = respaced(steps)
    bar = np.cumprod(1 - betas)[kept]
    x = noise[0]
    for t in reversed(range(steps)):
        eps = network(x, kept[t])
        x0, before = np.sqrt(1 / bar[t]) * x - np.sqrt(1 / bar[t] - 1) * eps, bar[t - 1] if t else 1.0
        x = np.sqrt(before) * x0 + np.sqrt(1 - before) * eps
    return x


@pytest.mark.parametrize("steps", [2, 4, 10, 21, 28, 50, 163, 250, 1000])
@pytest.mark.parametrize(("sampler", "original"), [("ddpm", original_dit), ("ddim", original_dit_ddim)])
def test_respaced_samplers_are_the_original_dits(sampler, original, steps):
    schedule = Schedule(kind="diffusion", spacing="respaced", variance="learned_range")
    noise = draw(steps)
    expected = original(np.linspace(1e-4, 2e-2, 1000), steps, noise)
    close(run_table(compile_table(schedule, sampler, steps), network, noise).final, expected, EXACT)
    other = compile_table(schedule.model_copy(update={"spacing": "leading"}), sampler, steps)
    if steps < 1000:
        apart(run_table(other, network, noise).final, expected, SAME)
