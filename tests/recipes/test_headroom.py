"""The best denoiser, against a plain average over many draws, and the scenes that it knows of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import Scene, every_plain_scene, plain_scene
from headroom import best

from tests.recipes.conftest import run

pytestmark = pytest.mark.slow


def test_the_best_guess_is_the_mean_of_what_may_be_behind() -> None:
    """Importance sampling: draws of the clean latent, weighted by how well each explains the noisy one."""
    torch.manual_seed(0)
    mean, std, weights = torch.randn(3, 2), torch.tensor([[0.3, 0.2]] * 3), torch.tensor([0.5, 0.3, 0.2])
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.6)
    x = torch.randn(4, 2)
    which = torch.multinomial(weights, 400_000, replacement=True)
    drawn = mean[which] + std[which] * torch.randn(400_000, 2)
    likely = (-0.5 * ((x[:, None] - alpha * drawn) / sigma).pow(2).sum(2)).softmax(1)
    assert torch.allclose(best(x, alpha, sigma, mean, std, weights), likely @ drawn, atol=5e-3)


def test_every_plain_scene_is_one_that_is_drawn_and_as_often() -> None:
    scenes, weights = every_plain_scene(7)
    rng = np.random.default_rng(0)
    counts: dict[Scene, int] = dict.fromkeys(scenes, 0)
    for _ in range(20_000):
        counts[plain_scene(rng, 7)] += 1
    assert abs(sum(weights) - 1) < 1e-9 and len(set(scenes)) == 77
    expected = 20_000 * np.array(weights)
    assert (np.abs(np.array(list(counts.values())) - expected) < 6 * np.sqrt(expected)).all()


def test_a_table(subjects: list[Any], made: Path, capsys: Any) -> None:
    options = ("--dit", made / "emoji-dit", "--vae", made / "emoji-mmdit" / "vae", "--subjects", 2, "--count", 4)
    run("headroom", subjects[:3], *options)
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(t) for t, *_ in rows] == list(range(100, 1000, 100))
    assert all(float(least) < float(network) for _, least, network in rows)
