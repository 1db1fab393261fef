"""How SD3's authors sample, plainly: the grid and the multistep of Stability-AI/sd3.5, in float64.

It is `get_sigmas` of sd3_infer.py and `sample_dpmpp_2m` of
sd3_impls.py (commit fbf8f48), in the words of DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import numpy as np
from torch import Tensor

Latent = TypeVar("Latent", Tensor, np.ndarray)


def moved(time: float, shift: float) -> float:
    """A time of [0, 1], moved towards the noise."""
    return shift * time / (1 + (shift - 1) * time)


def sigmas(shift: float, steps: int) -> list[float]:
    """Descending, with the last 0: times from the first moved level of 1000 to the last, each moved once more."""
    times = np.linspace(moved(1.0, shift), moved(0.001, shift), steps)
    return [*(moved(float(time), shift) for time in times), 0.0]


def _same(x: Latent, level: float) -> Latent:
    return x


def dpmpp_2m(
    clean: Callable[[Latent, float], Latent],
    x: Latent,
    levels: list[float],
    blend: Callable[[Latent, float], Latent] = _same,
) -> Latent:
    """The last latent. clean: the clean latent predicted for a latent at a level. blend: what a mask makes of a latent.

    The clock is u = -log(level). Each step is exact for the clean latent on a line through the last two; it is constant
    in the first step, and in the last, which ends at no noise.
    """
    before = None
    for at, (level, to) in enumerate(pairwise(levels)):
        now = clean(x, level)
        aim = now
        if before is not None and to > 0:
            ahead, behind = math.log(level / to), math.log(levels[at - 1] / level)
            aim = now + (now - before) * ahead / (2 * behind)
        x = blend(to / level * x + (1 - to / level) * aim, to)
        before = now
    return x
