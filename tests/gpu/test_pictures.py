"""Pictures of one device: as the CPU draws them in float32, near to that in bfloat16, and the same in any company."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from app.pool.pool import Pool
from app.report import Result
from app.request import Request
from tests.engine.test_edits import traffic as edits
from tests.engine.test_mixed import run_mixed, traffic
from tests.gpu.conftest import Opened
from tests.gpu.memory import narrow
from tests.parts.close import relative
from tests.parts.engine import Bench

pytestmark = pytest.mark.slow

PAIR = ("tiny-dit", "tiny-sd3")


def alone(pool: Pool, requests: Sequence[Request], **bench: bool) -> dict[tuple[str, int], Result]:
    """Each request with the engine to itself."""
    return {name: one for each in requests for name, one in Bench(pool, **bench).run([each]).results.items()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def together(pool: Pool, requests: Sequence[Request], **bench: bool) -> dict[tuple[str, int], Result]:
    mixed = run_mixed(pool, list(requests), seed=3, **bench)
    assert not mixed.failures and max(tick.rows for tick in mixed.forwards) >= 2
    return mixed.results


def furthest(some: Mapping[tuple[str, int], Result], others: Mapping[tuple[str, int], Result]) -> float:
    """The largest relative distance between the latents of the same requests."""
    assert some.keys() == others.keys()
    return max(relative(one.latents, others[name].latents) for name, one in some.items())


def test_float32_is_what_the_cpu_draws(device: str, opened: Opened) -> None:
    cards = opened("cpu").cards
    requests = traffic(cards, 24, seed=11) + edits(cards, 24, seed=11)
    wanted, got = (alone(opened(where), requests) for where in ("cpu", device))
    assert all(psnr(got[name].pixels, one.pixels) >= 40 for name, one in wanted.items())
    assert furthest(got, wanted) < 1e-3


def test_bfloat16_is_near_float32(device: str, opened: Opened) -> None:
    exact, rounded = opened(device), opened(device, torch.bfloat16)
    requests = [request for request in traffic(exact.cards, 36, seed=12) if request.recipe.steps <= 10]
    wanted, got = alone(exact, requests), alone(rounded, requests)
    distances = [psnr(got[name].pixels, one.pixels) for name, one in wanted.items()]
    assert np.median(distances) >= 30 and min(distances) >= 20, distances


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_mixed_traffic_equals_each_alone(device: str, dtype: torch.dtype, opened: Opened) -> None:
    pool = opened(device, dtype, PAIR)
    every = traffic(pool.cards, 32, seed=13) + edits(pool.cards, 24, seed=13)
    requests = [request for request in every if request.recipe.steps <= 20]
    wanted, got = alone(pool, requests), together(pool, requests)
    distances = [psnr(got[name].pixels, one.pixels) for name, one in wanted.items()]
    assert np.median(distances) >= 40 and min(distances) >= 30, distances
    assert dtype is torch.bfloat16 or furthest(got, wanted) < 1e-4


def test_deterministic_mode_is_bit_equal(device: str, opened: Opened) -> None:
    pool = opened(device, torch.bfloat16, PAIR)
    every = traffic(pool.cards, 32, seed=14) + edits(pool.cards, 24, seed=14)
    requests = [request for request in every if request.recipe.steps <= 10]
    wanted, got = alone(pool, requests, deterministic=True), together(pool, requests, deterministic=True)
    for name, one in wanted.items():
        np.testing.assert_array_equal(got[name].latents, one.latents)
        np.testing.assert_array_equal(got[name].pixels, one.pixels)


def test_a_step_out_of_memory_is_split_and_all_rows_live(
    device: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = opened(device, torch.float32, ("tiny-sd3",))
    requests = [request for request in traffic(pool.cards, 16, seed=15) if request.recipe.steps <= 10]
    wanted = alone(pool, requests)
    family = pool.family("tiny-sd3")
    assert family is not None
    refused = narrow(family, 3, monkeypatch)
    got = together(pool, requests)
    assert refused and furthest(got, wanted) < 1e-4
