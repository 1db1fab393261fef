"""Milliseconds of one denoising step by its passes, beside the least that its counted work takes on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from app.bench.machine import Ceilings, Spread, alternate, seconds
from app.cards.card import Size
from app.engine.slots import Slots
from app.engine.step import denoise_step, gather
from app.families.base import Family
from app.request import Guidance
from app.samplers.table import compile_table

META = torch.device("meta")


class Work(NamedTuple):
    """The work of one forward. flops: of the matrix products, two a multiply-add, as torch counts them.

    bytes: every weight once, latents and conditions in, the output out; what lies between layers may stay in a cache.
    """

    flops: int
    bytes: int


class Measured(NamedTuple):
    """A step of this many passes: its time, its work, and the least seconds that the machine needs for the work."""

    passes: int
    time: Spread
    work: Work
    floor: float

    @property
    def share(self) -> float:
        """The floor's share of the time."""
        return self.floor / self.time.median

    def facts(self) -> dict[str, Any]:
        """A row of the JSON line."""
        return {
            "passes": self.passes,
            "ms": self.time.ms(),
            "ms_a_pass": round(self.time.median * 1e3 / self.passes, 4),
            "gflop": round(self.work.flops / 1e9, 4),
            "mbytes": round(self.work.bytes / 1e6, 3),
            "floor_ms": round(self.floor * 1e3, 4),
            "share_of_floor": round(self.share, 4),
        }


def measure_steps(family: Family, size: Size, passes: Sequence[int], rounds: int, most: Ceilings) -> list[Measured]:
    """Time the engine's step for unguided rows of one pass, in turns. Raises InvalidValue: no size of the network."""
    length = family.card.text_length
    with torch.inference_mode():
        ways = {str(count): _way(family, size, count) for count in passes}
        times = alternate(ways, rounds)
    works = {count: forward_work(family, *size, length, count) for count in passes}
    return [Measured(n, times[str(n)], works[n], most.floor(*works[n])) for n in passes]


def _way(family: Family, size: Size, passes: int) -> Callable[[], float]:
    """A function that runs one step of this many rows of the card's default sampler and returns its seconds."""
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
        slots.x.copy_(start)  # a network of random weights would leave the range of floats
        return seconds(lambda: denoise_step(family, slots, gather(slots, rows)), family.device)

    return step


def forward_work(family: Family, width: int, height: int, text_length: int, passes: int) -> Work:
    """Count the work of `family.denoise`; nothing is computed, and the weights may be anywhere, or nowhere."""
    shadow: Any = copy.copy(family)
    shadow.network, shadow.device = _shadow(family.network), META
    x = torch.empty(passes, *family.latent_shape(width, height), device=META)
    conditions = {
        name: torch.empty(passes, *value.shape[1:], dtype=value.dtype, device=META)
        for name, value in family.blank(text_length).items()
    }
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        out, frac = shadow.denoise(x, torch.empty(passes, device=META), conditions)
    moved = [*family.network.parameters(), x, *conditions.values(), out, *(() if frac is None else (frac,))]
    return Work(counter.get_total_flops(), sum(tensor.nbytes for tensor in moved))


def _shadow(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module, as its class is written, with every tensor on the meta device."""
    tensors: dict[int, torch.Tensor] = {id(buffer): _empty(buffer) for buffer in network.buffers()}
    for weight in network.parameters():
        tensors[id(weight)] = torch.nn.Parameter(_empty(weight), requires_grad=False)
    return copy.deepcopy(network, tensors)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
