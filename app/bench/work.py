"""Work: the floating point operations and the bytes of one forward, counted and not measured.

Knows nothing of time or of a machine: nothing is computed, the network's shadow runs on the meta device.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from app.families.base import Family

META = torch.device("meta")


class Work(NamedTuple):
    """flops: floating point operations of the matrix products, two a multiply-add, as torch counts them. bytes: every
    weight once, latents and conditions in, the output out; what is kept between layers may never leave a cache."""

    flops: int
    bytes: int


def forward_work(family: Family, width: int, height: int, text_length: int, passes: int) -> Work:
    """The work of `family.denoise` for this many passes; the weights may be anywhere, or nowhere."""
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
    tensors = {id(p): torch.nn.Parameter(_empty(p), requires_grad=False) for p in network.parameters()}
    buffers = {id(b): _empty(b) for b in network.buffers()}
    return copy.deepcopy(network, {**tensors, **buffers})


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
