"""Step: milliseconds of one denoising step against its passes, beside the floor of this machine.

Knows nothing of requests or of order: rows are put into slots by hand, and run by the step that the engine runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from app.bench.machine import Ceilings, wait
from app.bench.timing import Spread, alternate
from app.bench.work import Work, forward_work
from app.cards.card import Size
from app.engine.slots import Slots
from app.engine.step import denoise_step, gather
from app.families.base import Family
from app.request import Guidance
from app.samplers.table import compile_table


class Measured(NamedTuple):
    """A step of so many passes: its time, its work, and the seconds that the machine needs for that at the least."""

    passes: int
    time: Spread
    work: Work
    floor: float

    @property
    def share(self) -> float:
        """The floor's share of the time."""
        return self.floor / self.time.median


def measure_steps(family: Family, size: Size, passes: Sequence[int], rounds: int, most: Ceilings) -> list[Measured]:
    """The steps of unguided rows, one pass each, in turns. Raises InvalidValue: a size that the network has not."""
    length = family.card.text_length
    with torch.inference_mode():
        ways = {str(count): _way(family, size, count) for count in passes}
        times = alternate(ways, rounds)
    works = {count: forward_work(family, *size, length, count) for count in passes}
    return [Measured(n, times[str(n)], works[n], most.floor(*works[n])) for n in passes]


def _way(family: Family, size: Size, passes: int) -> Callable[[], float]:
    """A function that runs one step of this many rows of the card's default sampler and gives its seconds."""
    card, shape = family.card, family.latent_shape(*size)
    tokens = family.image_tokens(*size)
    table = compile_table(card.schedule, card.defaults.sampler, card.defaults.num_inference_steps, tokens=tokens)
    slots = Slots(passes, shape, family.device)
    scale = card.defaults.guidance_scale if card.guidance == "embedded" else 0.0
    conditions = {name: value for name, value in family.blank(card.text_length).items() if name != "guidance"}
    first = torch.randn(passes, *shape, generator=torch.Generator().manual_seed(0)) * table.init
    rows = np.array([slots.take(table, noise, conditions, Guidance(embedded=scale)) for noise in first], np.int64)
    start = slots.x.clone()

    def step() -> float:
        slots.x.copy_(start)  # a network of random weights would leave what a float can hold
        wait(family.device)
        begin = time.perf_counter()
        denoise_step(family, slots, gather(slots, rows))
        wait(family.device)
        return time.perf_counter() - begin

    return step
