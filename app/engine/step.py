"""Step: one forward of the network and one affine update, for rows of any sampler, step and guidance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from app.engine.slots import LINE, PASSES, Gather, Slots
from app.families.base import Family

_NOISE, _SKIP = LINE.index("xz"), LINE.index("skip")


class Indices(NamedTuple):
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
    """What a forward of these slots [R] gathers; with a bucket, every axis is padded to it by the spare slot.

    The slots keep it: while the same rows run together, in the same order, it is the same object.
    """
    skipping = (slots.plan[rows, slots.line[rows], _SKIP] != 0).astype(np.int64)  # rows with a pass more on their line
    key = (rows.tobytes(), skipping.tobytes(), bucket)
    kept = slots.gathered
    if kept is None or kept.key != key:
        kept = slots.gathered = _upload(slots, key, indices(slots, rows, skipping, bucket))
    return kept


def indices(slots: Slots, rows: np.ndarray, skipping: np.ndarray, bucket: int | None = None) -> Indices:
    """Lay out the passes of these slots, row after row. skipping: [R] 1 for a row with a pass more on its line."""
    guided = slots.guided[rows]
    counts = 1 + guided + skipping
    cond = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(rows)), counts)
    nth = np.arange(len(owner)) - cond[owner]
    skips = (nth > guided[owner]).astype(np.int64)
    # A pass that skips layers sees the row's own condition.
    places = PASSES * rows[owner] + nth * (1 - skips)
    other, skip = cond + guided, cond + skipping * (guided + 1)
    plan = Indices(rows, places, owner, cond, other, skip, skips)
    if bucket is None:
        return plan
    # When passes are missing so are rows, hence the row after the last real one is a spare and owns the padding.
    idle = min(len(owner), bucket - 1)
    fills = (slots.spare, PASSES * slots.spare, len(rows), idle, idle, idle, 0)
    return Indices(*(_pad(index, bucket, fill) for index, fill in zip(plan, fills, strict=True)))


def _pad(index: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.concatenate([index, np.full(length - len(index), fill, np.int64)])


def _upload(slots: Slots, key: tuple[bytes, bytes, int | None], plan: Indices) -> Gather:
    """One copy to the device for all indices, and the conditions of these passes side by side."""
    every = torch.from_numpy(np.concatenate(plan)).to(slots.x.device)
    rows, places, owner, cond, other, skip, skips = every.split([len(index) for index in plan])  # type: ignore[no-untyped-call]
    return Gather(
        key, plan.rows, rows, owner, cond, other, skip,
        skips.bool() if plan.skips.any() else None,
        {name: value.index_select(0, places) for name, value in slots.conditions.items()},
        alone=len(plan.owner) == len(plan.rows) and bool((plan.owner == np.arange(len(plan.rows))).all()),
        padding=int((plan.places >= PASSES * slots.spare).sum()),
    )  # fmt: skip


def denoise_step(family: Family, slots: Slots, plan: Gather) -> torch.Tensor:
    """Run one line of the table of every row and return float32 [R]: `totals` of the new latents.

    x' = xx x + xo out + xm mem + xz exp(zf frac / 2) noise;  mem' = mx x + mo out, the predicted clean latent.
    out = cond + weight (cond - other) is classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) with
    weight = scale - 1; an unguided row points at itself, which is exact. Skip-layer guidance adds skip (cond - skip)
    likewise (sd3_infer.py of Stability-AI/sd3.5). Buffers change last, so a step that raises can be run again from
    where it started.
    """
    lines = slots.lines(plan.at)[:, :, None, None, None]
    columns = torch.from_numpy(lines).to(slots.x.device).unbind(1)
    t, c_in, xx, xo, xm, xz, zf, mx, mo, weight, skip_weight, scale = columns
    x, mem = slots.x.index_select(0, plan.rows), slots.mem.index_select(0, plan.rows)

    conditions = dict(plan.conditions)
    if family.card.guidance == "embedded":
        conditions["guidance"] = scale.flatten().index_select(0, plan.owner)
    if plan.skips is not None:
        conditions["skip"] = plan.skips
    raw, frac = family.denoise(_owned(c_in * x, plan), _owned(t.flatten(), plan), conditions)
    out = raw if plan.alone else guide(raw, plan.cond, plan.other, weight, family.card.guided_channels)
    if plan.skips is not None:
        out = out + skip_weight * (raw[plan.cond] - raw[plan.skip])

    # A multiply and then a fused multiply-add a term, in place: one call and one walk over the latents for each.
    clean = (mx * x).addcmul_(mo, out)
    new = x.mul_(xx).addcmul_(xo, out).addcmul_(xm, mem)
    if lines[:, _NOISE].any():
        spread = xz if frac is None else xz * torch.exp(0.5 * zf * frac[plan.cond])
        new.addcmul_(spread, slots.noise.index_select(0, plan.rows))
    sums = totals(new)
    # Nothing is allocated from here on: an error (out of memory) leaves both buffers as they were.
    slots.x.index_copy_(0, plan.rows, new)
    slots.mem.index_copy_(0, plan.rows, clean)
    return sums


def _owned(values: torch.Tensor, plan: Gather) -> torch.Tensor:
    """One value for each pass, of one for each row."""
    return values if plan.alone else values.index_select(0, plan.owner)


def totals(latents: torch.Tensor) -> torch.Tensor:
    """latents: [R, C, h, w] -> [R], the sum of each row: finite as long as every number in it is.

    `isfinite` of each number would take longer than the whole update. Finite latents whose sum is not are beyond 1e33,
    and no image either.
    """
    return latents.flatten(1).sum(1)


def guide(
    out: torch.Tensor, cond: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, channels: int | None
) -> torch.Tensor:
    """out: [P, C, h, w], weight: [R, 1, 1, 1] -> [R, C, h, w]; `channels`: how many are guided (original DiT: 3)."""
    own, away = out.index_select(0, cond), out.index_select(0, other)
    if channels is None:
        return own.lerp_(away, -weight)  # exact where the two are the same
    own[:, :channels].lerp_(away[:, :channels], -weight)
    return own
