"""The heart: one forward of the network and one affine update, for rows of any sampler, step and guidance.

Knows nothing of which rows these are or why they were chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from app.engine.slots import LINE, PASSES, Slots
from app.families.base import Family

_NOISE = LINE.index("xz")


class Gather(NamedTuple):
    """Indices of one forward of P passes over R rows, int64 on the host.

    rows: [R] slots. places: [P] places in `Slots.conditions`. owner: [P] the row (0..R-1) of a pass.
    cond, other, skip: [R] passes (0..P-1): the row's own, and those that guidance and skip-layer guidance move away
    from (its own where there is none). skips: [P] 1 for a pass that leaves out the card's skip layers, else 0.
    """

    rows: np.ndarray
    places: np.ndarray
    owner: np.ndarray
    cond: np.ndarray
    other: np.ndarray
    skip: np.ndarray
    skips: np.ndarray


def gather(slots: Slots, rows: np.ndarray, bucket: int | None = None) -> Gather:
    """Lay out the passes of these slots, row after row; with a bucket, every axis is padded to it by the spare slot."""
    guided, skipping = slots.guided[rows], slots.skipping(rows)
    counts = 1 + guided + skipping
    cond = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(rows)), counts)
    nth = np.arange(len(owner)) - cond[owner]
    skips = (nth > guided[owner]).astype(np.int64)
    # A pass that skips layers sees the row's own condition.
    places = PASSES * rows[owner] + nth * (1 - skips)
    other, skip = cond + guided, cond + skipping * (guided + 1)
    plan = Gather(rows, places, owner, cond, other, skip, skips)
    if bucket is None:
        return plan
    # When passes are missing so are rows, hence the row after the last real one is a spare and owns the padding.
    idle = min(len(owner), bucket - 1)
    fills = (slots.spare, PASSES * slots.spare, len(rows), idle, idle, idle, 0)
    return Gather(*(_pad(index, bucket, fill) for index, fill in zip(plan, fills, strict=True)))


def _pad(index: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.concatenate([index, np.full(length - len(index), fill, np.int64)])


def denoise_step(family: Family, slots: Slots, plan: Gather) -> torch.Tensor:
    """Run one line of the table of every row and return bool [R]: whether the row's latent is still finite.

    x' = xx x + xo out + xm mem + xz exp(zf frac / 2) noise;  mem' = mx x + mo out, the predicted clean latent.
    out = cond + weight (cond - other) is classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) with
    weight = scale - 1; an unguided row points at itself, which is exact. Skip-layer guidance adds skip (cond - skip)
    likewise (sd3_infer.py of Stability-AI/sd3.5). Buffers change last, so a step that raises can be run again from
    where it started.
    """
    device = slots.x.device
    sizes = [len(index) for index in plan]
    indices = torch.from_numpy(np.concatenate(plan)).to(device)
    rows, places, owner, cond, other, skip, skips = indices.split(sizes)  # type: ignore[no-untyped-call]
    lines = slots.lines(plan.rows)
    columns = torch.from_numpy(lines).to(device)[:, :, None, None, None].unbind(1)
    t, c_in, xx, xo, xm, xz, zf, mx, mo, weight, skip_weight, scale = columns

    x, mem = slots.x[rows], slots.mem[rows]
    conditions = {name: value[places] for name, value in slots.conditions.items()}
    if family.card.guidance == "embedded":
        conditions["guidance"] = scale.flatten()[owner]
    if plan.skips.any():
        conditions["skip"] = skips.bool()
    raw, frac = family.denoise((c_in * x)[owner], t.flatten()[owner], conditions)
    out = guide(raw, cond, other, weight, family.card.guided_channels)
    if plan.skips.any():
        out = out + skip_weight * (raw[cond] - raw[skip])

    new = xx * x + xo * out + xm * mem
    if lines[:, _NOISE].any():
        spread = xz if frac is None else xz * torch.exp(0.5 * zf * frac[cond])
        new = new + spread * slots.noise[rows]
    clean, finite = mx * x + mo * out, torch.isfinite(new).flatten(1).all(1)
    # Nothing is allocated from here on: an error (out of memory) leaves both buffers as they were.
    slots.x[rows] = new
    slots.mem[rows] = clean
    return finite


def guide(
    out: torch.Tensor, cond: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, channels: int | None
) -> torch.Tensor:
    """out: [P, C, h, w], weight: [R, 1, 1, 1] -> [R, C, h, w]; `channels`: how many are guided (original DiT: 3)."""
    own = out[cond]
    pull = weight * (own - out[other])
    if channels is not None:
        pull[:, channels:] = 0
    return own + pull
