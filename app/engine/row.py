"""Row: one image in flight. Work: what the device does next, and for which rows. Outcome: what came of a work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from app.cards.card import Card
from app.errors import InstepError, ModelNotFound
from app.report import Phase, Result, Timings
from app.request import Condition, Key, Request
from app.samplers.table import compile_table

if TYPE_CHECKING:
    import numpy as np
    import torch

    from app.pool.policy import Lease


def default_key(card: Card) -> Key:
    """The key of a request that leaves size and text length to the card."""
    return Key(card.id, *card.default_size, card.text_length)


Stage = Literal["waiting", "started", "finished", "gone"]


@dataclass(eq=False, slots=True)
class Row:
    """One image of a request, from its arrival to its pixels.

    lines: lines of its table; line: the next one to run; skipping: those with a pass more, for skip-layer guidance.
    each: passes of a line without that; total: passes of all lines.
    slot: its place in the key's `Slots` once started. noisy: the lines whose noise is not drawn yet.
    Times are on the engine's clock, in seconds. idled: the wait between its encode and its first step.
    """

    request: Request
    index: int
    key: Key
    lines: int
    arrived: float
    sequence: int
    line: int = 0
    stage: Stage = "waiting"
    slot: int = -1
    lease: Lease | None = None
    noise: torch.Generator | None = None
    skipping: range = range(0)
    noisy: set[int] = field(default_factory=set)
    warnings: tuple[str, ...] = ()
    served: float = 0.0
    idled: float = 0.0
    encode_start: float = 0.0
    denoise_start: float = 0.0
    decode_start: float = 0.0
    neighbours: int = 0
    previews: int = 0
    each: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.each = 2 if self.request.recipe.guidance.guided else 1
        self.total = self.lines * self.each + len(self.skipping)

    @property
    def passes(self) -> int:
        """Passes of its next line."""
        return self.each + (self.line in self.skipping)

    @property
    def remaining(self) -> int:
        """Passes through the network still to come."""
        plain = (self.lines - self.line) * self.each
        if not self.skipping:
            return plain
        return plain + max(0, self.skipping.stop - max(self.line, self.skipping.start))

    @property
    def condition(self) -> Condition:
        return self.request.images[self.index].condition

    @property
    def seed(self) -> int:
        return self.request.images[self.index].seed

    @property
    def deadline(self) -> float:
        deadline = self.request.delivery.deadline
        return math.inf if deadline is None else deadline

    @property
    def begun(self) -> bool:
        """Whether it has run a line."""
        return self.line > 0

    def preview_due(self) -> bool:
        """Whether a partial image is due after the line just run; they are evenly spread."""
        wanted = self.request.delivery.previews
        return (
            self.previews < wanted
            and self.line < self.lines
            and self.line * (wanted + 1) >= self.lines * (self.previews + 1)
        )


@dataclass(frozen=True, slots=True)
class Work:
    """The next thing the device does: one phase for rows of one key, or one width of the key's profile without rows."""

    phase: Phase | Literal["profile"]
    key: Key
    rows: list[Row] = field(default_factory=list)

    @property
    def passes(self) -> int:
        return sum(row.passes for row in self.rows)


@dataclass(frozen=True, slots=True)
class Caps:
    """What a key may do at once, by its cost curve: passes a forward, rows an encode and a decode, slots.

    rate: seconds a pass costs at that width. bytes: of all its slots. trial: passes of a wider forward to try as soon
    as rows nearly fill it; 0 for none.
    """

    passes: int
    encode: int
    decode: int
    slots: int
    rate: float
    bytes: int = 0
    trial: int = 0


@dataclass(frozen=True, slots=True)
class Image:
    """A decoded row. pixels: uint8 [H, W, 3]; latents: float32 [C, h, w], when the request keeps them."""

    row: Row
    pixels: np.ndarray
    latents: np.ndarray | None

    def result(self, now: float) -> Result:
        """The report of this image, which is ready now."""
        row = self.row
        timings = Timings(
            queue=row.encode_start - row.arrived + row.idled,
            encode=row.denoise_start - row.encode_start,
            denoise=row.decode_start - row.denoise_start - row.idled,
            decode=now - row.decode_start,
            steps=row.lines,
            shared=row.neighbours / row.lines,
        )
        return Result(row.request.id, row.index, row.seed, self.pixels, timings, self.latents, row.warnings)


@dataclass(slots=True)
class Outcome:
    """Images that are done, rows that failed alone, padding passes, and how many forwards ran out of memory.

    error: why a profile could not be measured. idle: nothing was done, because the parts had left the device.
    text_hits, text_misses: texts that the encoders' cache had, or had not.
    """

    images: list[Image] = field(default_factory=list)
    failed: list[tuple[Row, InstepError]] = field(default_factory=list)
    error: InstepError | None = None
    padding: int = 0
    out_of_memory: int = 0
    text_hits: int = 0
    text_misses: int = 0
    idle: bool = False


def rows_of(request: Request, cards: Mapping[str, Card], now: float, numbers: Iterator[int]) -> list[Row]:
    """One waiting row for each image, numbered in order of arrival. Raises ModelNotFound, InvalidValue."""
    recipe = request.recipe
    card = cards.get(recipe.model)
    if card is None:
        raise ModelNotFound(f"there is no model {recipe.model}", param="model")
    lines = compile_table(card.schedule, recipe.sampler, recipe.steps, tokens=1).lines
    key, skipping = recipe.key, recipe.skipping(lines)
    return [
        Row(request, index, key, lines, now, next(numbers), skipping=skipping) for index in range(len(request.images))
    ]
