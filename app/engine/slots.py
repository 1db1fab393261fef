"""Slots: the tensors of the rows of one key. Rows never move: a forward gathers them by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from app.families.base import Conditions
from app.request import Guidance, Key
from app.samplers.table import COLUMNS, Table

IDLE_KEYS = 4
"""Keys without rows whose slots stay allocated, so that the next request of that size finds them."""

POOL_BYTES = 1 << 30
"""Most bytes that the slots of all keys take together."""

PASSES = 2
"""Condition places a slot has: its own and the one that guidance moves away from."""

LINE = (*COLUMNS, "weight", "skip", "scale")
"""Columns of a row's plan: the sampler's table; the weights of guidance (its scale - 1) and of skip-layer guidance on
that line; the scale for a network with embedded guidance."""

_XX, _XZ, _SKIP = LINE.index("xx"), LINE.index("xz"), LINE.index("skip")


class Gather(NamedTuple):
    """Indices that are on the device, and the conditions of their passes there. at: the slots, on the host.

    alone: every row makes the one pass that it owns. padding: passes that nobody reads. skips: None when no pass does.
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
    padding: int


class Slots:
    """Buffers for `capacity` rows and one spare, which is all that padding reads and writes.

    x, mem, noise: float32 [capacity + 1, C, h, w]. conditions: by name, [PASSES * (capacity + 1), ...].
    plan: float32 [capacity + 1, lines, len(LINE)] on the host, the rows' tables. line, guided: [capacity + 1].
    gathered: what the last forward gathered by, until a row comes or goes. bytes: as their pool counts them.
    """

    def __init__(self, capacity: int, shape: Sequence[int], device: torch.device, size: int = 0) -> None:
        self.capacity = self.spare = capacity
        self.bytes = size
        self.x = torch.zeros(capacity + 1, *shape, device=device)
        self.mem = torch.zeros_like(self.x)
        self.noise = torch.zeros_like(self.x)
        self.conditions: Conditions = {}
        self.plan = self._empty_plan(64)
        self.line = np.zeros(capacity + 1, np.int64)
        self.guided = np.zeros(capacity + 1, np.int64)
        self.gathered: Gather | None = None
        self._drawn = np.zeros(capacity + 1, np.int64)  # lines that have had their noise
        self._dice: dict[int, torch.Generator] = {}
        self._free = list(range(capacity))[::-1]

    @property
    def idle(self) -> bool:
        """Whether no row is here."""
        return len(self._free) == self.capacity

    def take(
        self,
        table: Table,
        x: torch.Tensor,
        conditions: Conditions,
        guidance: Guidance,
        skipping: range = range(0),
        dice: torch.Generator | None = None,
    ) -> int:
        """Add a row and return its slot. x: [C, h, w], the first noise.

        conditions: by name, [1 or 2, ...]: the row's own first. skipping: lines with skip-layer guidance. dice: draws
        the noise of its steps. mem and noise start at zero (0 * NaN is NaN).
        """
        slot = self._free[-1]
        self.gathered = None
        self.x[slot] = x
        self.mem[slot] = self.noise[slot] = 0
        self.line[slot] = self._drawn[slot] = 0
        self.guided[slot] = guidance.guided
        if dice is not None:
            self._dice[slot] = dice
        self._write_plan(slot, table, guidance, skipping)
        for name, value in conditions.items():
            if name not in self.conditions:
                self.conditions[name] = value.new_zeros((PASSES * (self.capacity + 1), *value.shape[1:]))
            self.conditions[name][PASSES * slot : PASSES * slot + value.shape[0]] = value
        return self._free.pop()

    def release(self, slot: int) -> None:
        self.gathered = None
        self._dice.pop(slot, None)
        self._free.append(slot)

    def draw(self, rows: np.ndarray) -> None:
        """Draw the noise of these slots [R] whose line adds some, once a line: a replayed step must see the same."""
        lines = self.line[rows]
        due = rows[(self.plan[rows, lines, _XZ] != 0) & (self._drawn[rows] <= lines)]
        if len(due):
            drawn = [torch.randn((1, *self.noise.shape[1:]), generator=self._dice[slot]) for slot in due.tolist()]
            index = torch.from_numpy(due).to(self.noise.device)
            self.noise.index_copy_(0, index, torch.cat(drawn).to(self.noise.device))
            self._drawn[due] = self.line[due] + 1

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """The line each of these slots runs next: float32 [R, len(LINE)]."""
        lines: np.ndarray = self.plan[rows, self.line[rows]]
        return lines

    def _empty_plan(self, lines: int) -> np.ndarray:
        plan = np.zeros((self.capacity + 1, lines, len(LINE)), np.float32)
        plan[self.spare, :, _XX] = 1.0
        return plan

    def _write_plan(self, slot: int, table: Table, guidance: Guidance, skipping: range) -> None:
        if table.lines > self.plan.shape[1]:
            longer = self._empty_plan(table.lines)
            longer[:, : self.plan.shape[1]] = self.plan
            self.plan = longer
        width = len(COLUMNS)
        self.plan[slot, : table.lines, :width] = table.coefficients()
        weight = guidance.scale - 1 if guidance.guided else 0.0
        self.plan[slot, : table.lines, width:] = weight, 0.0, guidance.embedded or 0.0
        if guidance.skip:
            self.plan[slot, skipping.start : skipping.stop, _SKIP] = guidance.skip.scale


class SlotPool:
    """The slots of all keys of one device, within a budget of bytes."""

    def __init__(self, budget: int = POOL_BYTES) -> None:
        self._budget = budget
        self.by_key: dict[Key, Slots] = {}

    def __getitem__(self, key: Key) -> Slots:
        return self.by_key[key]

    @property
    def bytes(self) -> int:
        return sum(slots.bytes for slots in self.by_key.values())

    def has_room(self, key: Key, size: int) -> bool:
        """Whether slots of `size` bytes can be opened; a key is never refused while no other has rows."""
        if key in self.by_key:
            return True
        used = sum(slots.bytes for slots in self.by_key.values() if not slots.idle)
        return used == 0 or used + size <= self._budget

    def open(self, key: Key, size: int, capacity: int, shape: Sequence[int], device: torch.device) -> Slots:
        """The key's slots, made on first need with so many bytes; the longest unused slots without rows make room."""
        slots = self.by_key.pop(key, None)
        if slots is None:
            self._close_idle(size)
            slots = Slots(capacity, shape, device, size)
        self.by_key[key] = slots
        return slots

    def forget(self, model: str) -> None:
        """Close the slots of this model that have no rows."""
        for key in [key for key, slots in self.by_key.items() if key.model == model and slots.idle]:
            del self.by_key[key]

    def _close_idle(self, size: int) -> None:
        idle = [key for key, slots in self.by_key.items() if slots.idle]
        while idle and (len(idle) > IDLE_KEYS or self.bytes + size > self._budget):
            del self.by_key[idle.pop(0)]
