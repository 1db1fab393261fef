"""Step: the tensors of the rows of one key (Slots), and one forward of the network with one affine update on them.

Rows of any sampler, step and guidance share it. They never move: a forward gathers them by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from app.families.adapters import Adapted, Used, spans_of
from app.families.base import Conditions, Family
from app.samplers.table import COLUMNS

PASSES = 2
"""Condition places a slot has: its own and the one that guidance moves away from."""

LINE = (*COLUMNS, "weight", "skip", "scale")
"""Columns of a row's plan: the sampler's table; the weights of guidance (its scale - 1) and of skip-layer guidance on
that line; the scale for a network with embedded guidance."""

_XX, _XZ, SKIP = LINE.index("xx"), LINE.index("xz"), LINE.index("skip")
_KEPT = slice(LINE.index("ka"), LINE.index("kb") + 1)


Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a row with a mask keeps: its source and its first noise, float32 [C, h, w], and bool [h, w] where it is new."""


class Start(NamedTuple):
    """What a row brings to its slot. x: its latent, float32 [C, h, w]. dice: draws the noise of its steps. kept: for a
    row with a mask."""

    x: torch.Tensor
    dice: torch.Generator | None = None
    kept: Kept | None = None


class Masks:
    """What the rows of one key keep of their sources, in places of their own, which double when all are taken.

    source, noise: float32 [places, C, h, w]. new: bool [places, 1, h, w]. place: of each slot, -1 where it has no mask.
    """

    def __init__(self, slots: int, shape: Sequence[int], device: torch.device) -> None:
        self.place = np.full(slots, -1)
        self.source = self.noise = torch.zeros(0, *shape, device=device)
        self.new = torch.zeros(0, 1, *shape[1:], dtype=torch.bool, device=device)

    @property
    def bytes(self) -> int:
        return self.source.nbytes + self.noise.nbytes + self.new.nbytes

    def put(self, slot: int, kept: Kept) -> None:
        """Store what a row keeps."""
        free = np.setdiff1d(np.arange(len(self.new)), self.place)
        place = int(free[0]) if len(free) else len(self.new)
        if not len(free):
            every = (self.source, self.noise, self.new)
            more = [torch.cat([one, one.new_zeros(max(4, place), *one.shape[1:])]) for one in every]
            self.source, self.noise, self.new = more
        self.source[place], self.noise[place], self.new[place, 0] = kept
        self.place[slot] = place

    def of(self, slot: int) -> Kept | None:
        """Copies of what a row's mask keeps; None without a mask."""
        at = self.place[slot]
        return None if at < 0 else (self.source[at].clone(), self.noise[at].clone(), self.new[at, 0].clone())

    def among(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Which of these slots [R] have a mask, as indices 0..R-1, and the places of those; None where none has."""
        places = self.place[rows]
        at = np.flatnonzero(places >= 0)
        return (at, places[at]) if len(at) else None

    def keep(self, at: torch.Tensor, places: torch.Tensor, latents: torch.Tensor, factors: torch.Tensor) -> None:
        """Write ka * source + kb * noise into latents [R, C, h, w], where the masks of its rows `at` [M] keep that.

        places: [M] of these rows. factors: [R, 2, 1, 1, 1], ka and kb. As in pipeline_stable_diffusion_3_inpaint.py.
        """
        ka, kb = factors.index_select(0, at).unbind(1)
        kept = (ka * self.source.index_select(0, places)).addcmul_(kb, self.noise.index_select(0, places))
        new = self.new.index_select(0, places)
        latents.index_copy_(0, at, torch.where(new, latents.index_select(0, at), kept))


class Slots:
    """Buffers for `capacity` rows and one spare, which is all that padding reads and writes.

    x, mem, noise: float32 [capacity + 1, C, h, w]. conditions: by name, [PASSES * (capacity + 1), ...].
    plan: float32 [capacity + 1, lines, len(LINE)] on the host, the rows' tables. line, guided: [capacity + 1].
    masks: what rows with a mask keep. used: adapters of the slots that have some. gathered: what the last forward
    gathered by, until a row comes or goes.
    """

    def __init__(self, capacity: int, shape: Sequence[int], device: torch.device, size: int = 0) -> None:
        self.capacity = self.spare = capacity
        self._size = size
        self.x = torch.zeros(capacity + 1, *shape, device=device)
        self.mem = torch.zeros_like(self.x)
        self.noise = torch.zeros_like(self.x)
        self.conditions: Conditions = {}
        self.plan = self._empty_plan(64)
        self.line = np.zeros(capacity + 1, np.int64)
        self.guided = np.zeros(capacity + 1, np.int64)
        self.masks = Masks(capacity + 1, shape, device)
        self.used: dict[int, Used] = {}
        self.gathered: Gather | None = None
        self._drawn = np.zeros(capacity + 1, np.int64)  # lines that have had their noise
        self._dice: dict[int, torch.Generator] = {}
        self._free = list(range(capacity))[::-1]

    @property
    def bytes(self) -> int:
        """As their pool counts them: what masks need comes on top when they come."""
        return self._size + self.masks.bytes

    @property
    def idle(self) -> bool:
        """Whether no row is here."""
        return len(self._free) == self.capacity

    def take(
        self,
        plan: np.ndarray,
        x: torch.Tensor,
        conditions: Conditions,
        dice: torch.Generator | None = None,
        kept: Kept | None = None,
    ) -> int:
        """Add a row and return its slot. plan: float32 [lines, len(LINE)]. x: [C, h, w], where it starts.

        conditions: by name, [1 or 2, ...]: the row's own first, then the one that guidance moves away from. dice: draws
        the noise of its steps. kept: for a row with a mask. mem and noise start at zero (0 * NaN is NaN).
        """
        slot = self._free[-1]
        self.gathered = None
        self.x[slot] = x
        self.mem[slot] = self.noise[slot] = 0
        self.line[slot] = self._drawn[slot] = 0
        if dice is not None:
            self._dice[slot] = dice
        self._write_plan(slot, plan)
        for name, value in conditions.items():
            if name not in self.conditions:
                self.conditions[name] = value.new_zeros((PASSES * (self.capacity + 1), *value.shape[1:]))
            self.conditions[name][PASSES * slot : PASSES * slot + len(value)] = value
            self.guided[slot] = len(value) - 1
        if kept is not None:  # last: an error before it leaves no mask to the next row of the slot
            self.masks.put(slot, kept)
        return self._free.pop()

    def release(self, slot: int) -> None:
        self.gathered = None
        self.masks.place[slot] = -1
        self.used.pop(slot, None)
        self._dice.pop(slot, None)
        self._free.append(slot)

    def start(self, slot: int) -> Start:
        """What a row needs to go on in a slot of another key: copies of tensors, and its generator."""
        return Start(self.x[slot].clone(), self._dice.get(slot), self.masks.of(slot))

    def draw(self, rows: np.ndarray) -> None:
        """Draw the noise of these slots [R] whose line adds some, once a line: a replayed step must see the same."""
        lines = self.line[rows]
        due = rows[(self.plan[rows, lines, _XZ] != 0) & (self._drawn[rows] <= lines)]
        if len(due):
            drawn = [torch.randn((1, *self.noise.shape[1:]), generator=self._dice[slot]) for slot in due.tolist()]
            index = torch.from_numpy(due).to(self.noise.device)
            self.noise.index_copy_(0, index, torch.cat(drawn).to(self.noise.device))
            self._drawn[due] = self.line[due] + 1

    def clean(self, rows: np.ndarray) -> torch.Tensor:
        """The predicted clean latents of these slots [R], and the source where masks keep it: float32 [R, C, h, w]."""
        clean = self.mem[torch.from_numpy(rows).to(self.mem.device)]
        if masked := self.masks.among(rows):
            at, places = (torch.from_numpy(one).to(clean.device) for one in masked)
            clean[at] = torch.where(self.masks.new[places], clean[at], self.masks.source[places])
        return clean

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """The line each of these slots runs next: float32 [R, len(LINE)]."""
        lines: np.ndarray = self.plan[rows, self.line[rows]]
        return lines

    def _empty_plan(self, lines: int) -> np.ndarray:
        plan = np.zeros((self.capacity + 1, lines, len(LINE)), np.float32)
        plan[self.spare, :, _XX] = 1.0
        return plan

    def _write_plan(self, slot: int, plan: np.ndarray) -> None:
        if len(plan) > self.plan.shape[1]:
            longer = self._empty_plan(len(plan))
            longer[:, : self.plan.shape[1]] = self.plan
            self.plan = longer
        self.plan[slot, : len(plan)] = plan


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


class Gather(NamedTuple):
    """Indices that are on the device, and the conditions of their passes there. at: the slots, on the host.

    alone: every row makes the one pass that it owns. skips: None when no pass does. masked: [M] rows (0..R-1) with a
    mask, and their places in `Slots.masks`; None when no row has one. adapted: the same for adapters.
    """

    key: tuple[bytes, bytes, int | None]
    at: np.ndarray
    rows: torch.Tensor
    owner: torch.Tensor
    cond: torch.Tensor
    other: torch.Tensor
    skip: torch.Tensor
    skips: torch.Tensor | None
    conditions: Conditions
    alone: bool
    masked: tuple[torch.Tensor, torch.Tensor] | None
    adapted: Adapted | None


def gather(slots: Slots, rows: np.ndarray, bucket: int | None = None, network: nn.Module | None = None) -> Gather:
    """What a forward of these slots [R] gathers; with a bucket, every axis is padded to it by the spare slot.

    The slots keep it: while the same rows run together, in the same order, it is the same object. network: what their
    adapters change.
    """
    skipping = (slots.plan[rows, slots.line[rows], SKIP] != 0).astype(np.int64)  # rows with a pass more on their line
    key = (rows.tobytes(), skipping.tobytes(), bucket)
    kept = slots.gathered
    if kept is None or kept.key != key:
        kept = slots.gathered = _upload(slots, key, indices(slots, rows, skipping, bucket), network)
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


def _upload(slots: Slots, key: tuple[bytes, bytes, int | None], plan: Indices, network: nn.Module | None) -> Gather:
    """One copy to the device for all indices, and the conditions of these passes side by side."""
    every = torch.from_numpy(np.concatenate(plan)).to(slots.x.device)
    rows, places, owner, cond, other, skip, skips = every.split([len(index) for index in plan])  # type: ignore[no-untyped-call]
    masked = slots.masks.among(plan.rows)
    adapted = None
    if network is not None and any(slot in slots.used for slot in plan.rows.tolist()):
        used = [slots.used.get(slot, ()) for slot in plan.rows[plan.owner].tolist()]
        adapted = Adapted(network, spans_of(used, slots.x.device, apart=key[2] is not None))
    conditions = {name: value.index_select(0, places) for name, value in slots.conditions.items()}
    if plan.skips.any():
        conditions["skip"] = skips.bool()
    return Gather(
        key, plan.rows, rows, owner, cond, other, skip, conditions.get("skip"), conditions,
        alone=len(plan.owner) == len(plan.rows) and bool((plan.owner == np.arange(len(plan.rows))).all()),
        masked=masked and (rows.new_tensor(masked[0]), rows.new_tensor(masked[1])),
        adapted=adapted,
    )  # fmt: skip


def denoise_step(family: Family, slots: Slots, rows: np.ndarray, bucket: int | None = None) -> torch.Tensor:
    """Run one line of the plan of every row, those of slots [R], and return float32 [R]: `totals` of the new latents.

    bucket: pad rows and passes to so many, by the spare slot; the result has them too.
    x' = xx x + xo out + xm mem + xz exp(zf frac / 2) noise;  mem' = mx x + mo out, the predicted clean latent;
    x' = ka source + kb first_noise where a mask keeps the source.
    out = cond + weight (cond - other) is classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) with
    weight = scale - 1; an unguided row points at itself, which is exact. Skip-layer guidance adds skip (cond - skip)
    likewise (sd3_infer.py of Stability-AI/sd3.5). Buffers change last, so a step that raises can be run again from
    where it started.
    """
    plan = gather(slots, rows, bucket, family.network)
    lines = slots.lines(plan.at)[:, :, None, None, None]
    columns = torch.from_numpy(lines).to(slots.x.device)
    t, c_in, xx, xo, xm, xz, zf, mx, mo, _, _, weight, skip_weight, scale = columns.unbind(1)
    x, mem = slots.x.index_select(0, plan.rows), slots.mem.index_select(0, plan.rows)

    conditions = dict(plan.conditions)
    if family.card.guidance == "embedded":
        conditions["guidance"] = scale.flatten().index_select(0, plan.owner)
    with plan.adapted or nullcontext():
        raw, frac = family.denoise(_owned(c_in * x, plan), _owned(t.flatten(), plan), conditions)
    out = raw if plan.alone else guide(raw, plan.cond, plan.other, weight, family.card.guided_channels)
    if plan.skips is not None:
        out = out + skip_weight * (raw[plan.cond] - raw[plan.skip])

    # A multiply and then a fused multiply-add a term, in place: one call and one walk over the latents for each.
    clean = (mx * x).addcmul_(mo, out)
    new = x.mul_(xx).addcmul_(xo, out).addcmul_(xm, mem)
    if lines[:, _XZ].any():
        spread = xz if frac is None else xz * torch.exp(0.5 * zf * frac[plan.cond])
        new.addcmul_(spread, slots.noise.index_select(0, plan.rows))
    if plan.masked is not None:
        slots.masks.keep(*plan.masked, new, columns[:, _KEPT])
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
