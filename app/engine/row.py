"""Row: one image in flight. Work: what the device does next, and what came of it. Caps: how much of a key at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from app.cards.card import Card
from app.errors import InstepError, ModelNotFound
from app.report import Phase, Place, Result, Timings
from app.request import Condition, Key, Request

if TYPE_CHECKING:
    import numpy as np
    import torch

    from app.pool.memory import Component


Kit = tuple[str, tuple[str, ...]]
"""A model and the names of adapters: what rows must have in common to need the same weights."""


def default_key(card: Card) -> Key:
    """The key of a request that leaves size and text length to the card."""
    return Key(card.id, *card.default_size, card.text_length)


@dataclass(eq=False, slots=True)
class Row:
    """One image of a request, from its arrival to its pixels.

    lines: lines of its table; line: the next one to run; skipping: those with a pass more, for skip-layer guidance.
    each: passes of a line without that; total: passes of all lines.
    slot: its place in the key's `Slots` once started. lease: the components of its network, which stay meanwhile.
    Times are on the engine's clock, in seconds. ages_at: it counts as aged from then on, while it waits. idled: the
    wait between its encode and its first step. apart: the last line, counted as in `place`, at which it shares no work.
    posterior: of the source that it starts from, as `Family.posterior`, once that is encoded. adapters: names.
    """

    request: Request
    index: int
    key: Key
    lines: int
    arrived: float
    sequence: int
    line: int = 0
    stage: Literal["waiting", "started", "finished", "gone"] = "waiting"
    slot: int = -1
    lease: list[Component] | None = None
    skipping: range = range(0)
    warnings: tuple[str, ...] = ()
    ages_at: float = math.inf
    served: float = 0.0
    idled: float = 0.0
    encode_start: float = 0.0
    denoise_start: float = 0.0
    decode_start: float = 0.0
    neighbours: int = 0
    previews: int = 0
    apart: int = -2
    posterior: torch.Tensor | None = None
    tenant: str = field(init=False)
    adapters: tuple[str, ...] = field(init=False)
    each: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.tenant = self.request.delivery.tenant
        self.adapters = tuple(name for name, _ in self.request.recipe.adapters)
        self.each = 2 if self.request.recipe.guidance.guided else 1
        self.total = self.each * self.lines + len(self.skipping)

    @property
    def unread(self) -> bool:
        """Whether it starts from a source that is not encoded yet."""
        return self.request.recipe.strength is not None and self.posterior is None

    @property
    def needs(self) -> Phase:
        """The phase whose components a waiting row needs next: the source takes those of a decode, the VAE."""
        return "decode" if self.unread else "encode"

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
    def kit(self) -> Kit:
        """What it computes with."""
        return self.key.model, self.adapters

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
    def place(self) -> Place:
        """What its next work computes."""
        return self.request.id, self.index, -1 if self.stage == "waiting" else self.line

    @property
    def suspect(self) -> bool:
        """Whether an engine process died where it stands, or later in it: it is computed in works of its own."""
        return self.apart > -2 and self.apart >= self.place[-1]

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

    def result(self, pixels: np.ndarray, latents: np.ndarray | None, now: float) -> Result:
        """The report of its image, which is ready now. pixels: uint8 [H, W, 3]; latents: float32 [C, h, w]."""
        timings = Timings(
            queue=self.encode_start - self.arrived + self.idled,
            encode=self.denoise_start - self.encode_start,
            denoise=self.decode_start - self.denoise_start - self.idled,
            decode=now - self.decode_start,
            steps=self.lines,
            shared=self.neighbours / self.lines,
        )
        return Result(self.request.id, self.index, self.seed, pixels, timings, latents, self.warnings)


@dataclass(slots=True)
class Work:
    """One phase for rows of one key, or one width of the key's measurement without rows; and what came of it.

    passes: of the rows' next lines in a denoise, else how many rows. start, seconds: when it began, and how long it
    took. images: rows with their pixels, and their latents where these are asked for. failed: rows that failed alone.
    error: why the key could not be measured. padding: passes that nobody reads. out_of_memory: forwards that did not
    fit. text_hits, text_misses: texts that the encoders' cache had, or had not. idle: nothing was done, because the
    components had left the device.
    """

    phase: Phase | Literal["profile"]
    key: Key
    rows: list[Row] = field(default_factory=list)
    passes: int = field(init=False)
    start: float = 0.0
    seconds: float = 0.0
    images: list[tuple[Row, np.ndarray, np.ndarray | None]] = field(default_factory=list)
    failed: list[tuple[Row, InstepError]] = field(default_factory=list)
    error: InstepError | None = None
    padding: int = 0
    out_of_memory: int = 0
    text_hits: int = 0
    text_misses: int = 0
    idle: bool = False

    def __post_init__(self) -> None:
        self.passes = sum([row.passes for row in self.rows]) if self.phase == "denoise" else len(self.rows)


@dataclass(slots=True)
class Caps:
    """What a key may do at once, by its costs: passes a forward, rows an encode and a decode, slots.

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


def rows_of(request: Request, cards: Mapping[str, Card], now: float, numbers: Iterator[int]) -> list[Row]:
    """One waiting row for each image that is not done, numbered in order of arrival.

    Raises ModelNotFound, InvalidValue.
    """
    recipe = request.recipe
    card = cards.get(recipe.model)
    if card is None:
        raise ModelNotFound(f"there is no model {recipe.model}", param="model")
    table = card.legs(recipe)[0].table
    lines, key, delivery = table.lines, recipe.key, request.delivery
    skipping = recipe.skipping(lines, table.first)
    arrived, apart = now if delivery.arrived is None else delivery.arrived, dict(delivery.apart)
    return [
        Row(request, index, key, lines, arrived, next(numbers), skipping=skipping, apart=apart.get(index, -2))
        for index in range(len(request.images))
        if index not in delivery.done
    ]
