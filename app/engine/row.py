"""Row: one image in flight. Work: what the device does next, and what came of it. Caps: how much of a key at once.

Patience: how many seconds a Work may be silent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from app.cards.card import Card
from app.errors import InstepError, ModelNotFound
from app.report import Announce, Phase, Place, Report, Result, Timings
from app.request import Condition, Key, Recipe, Request

if TYPE_CHECKING:
    import numpy as np
    import torch

    from app.engine.step import Start
    from app.pool.memory import Component
    from app.pool.pool import Pool


FACTOR = 10.0
"""Work counts as hung at so many times its estimate, but not before LEAST seconds and at MOST seconds at the latest."""

LEAST = 10.0
MOST = 30.0

LONG = 5.0
"""Work with an estimate over MOST / LONG seconds may take so many times its estimate."""

FIRST_AREA = 256**2
FIRST_ON_GPU = 120.0
COMPILING = 600.0
IDLE = 30.0

FADING = 0.98
"""An estimate that is too long shrinks by this at each work that takes less."""

Kit = tuple[str, tuple[str, ...]]
"""A model and the names of adapters: what rows must have in common to need the same weights."""


def default_key(card: Card) -> Key:
    """The key of a request that leaves size and text length to the card."""
    return Key(card.id, *card.default_size, card.text_length)


@dataclass(eq=False, slots=True)
class Row:
    """One image of a request, from its arrival to its pixels.

    legs: the key of each model that draws it, with the lines of its table. leg: the index of the present one. key: of
    the present leg. begins, ends: its first line and the one after its last. lines: of all legs. line: the next to run.
    skipping: lines with a pass more, for skip-layer guidance. each: passes of a line without that; total: of all lines.
    slot: its place in the key's `Slots` once started. lease: the components of its network, which stay meanwhile.
    start: what it takes into the slot of its next leg, while it waits for that.
    Times are on the engine's clock, in seconds. ages_at: it counts as aged from then on, while it waits. since: when it
    was last computed or encoded, or came. queued, encoded: how long it waited, in every leg, and how long its encodes
    took. encode_start: of the present leg. apart: the last line, counted as in `place`, at which it shares no work.
    posterior: of the source that it starts from, as `Family.posterior`, once that is encoded. adapters: names.
    """

    request: Request
    index: int
    key: Key
    lines: int
    arrived: float
    sequence: int
    legs: tuple[tuple[Key, int], ...] = ()
    leg: int = 0
    begins: int = 0
    line: int = 0
    stage: Literal["waiting", "started", "finished", "gone"] = "waiting"
    slot: int = -1
    lease: list[Component] | None = None
    skipping: range = range(0)
    warnings: tuple[str, ...] = ()
    ages_at: float = math.inf
    served: float = 0.0
    queued: float = 0.0
    encoded: float = 0.0
    encode_start: float = 0.0
    decode_start: float = 0.0
    neighbours: int = 0
    previews: int = 0
    apart: int = -2
    posterior: torch.Tensor | None = None
    start: Start | None = None
    ends: int = field(init=False)
    since: float = field(init=False)
    tenant: str = field(init=False)
    adapters: tuple[str, ...] = field(init=False)
    each: int = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.legs = self.legs or ((self.key, self.lines),)
        self.ends, self.since = self.legs[0][1], self.arrived
        self.tenant = self.request.delivery.tenant
        own = self.request.recipe.adapters if self.key.model == self.request.recipe.model else ()
        self.adapters = tuple(name for name, _ in own)
        self.each = 2 if self.request.recipe.guidance.guided else 1
        self.total = self.each * self.lines + len(self.skipping)

    def switch(self) -> None:
        """Wait for the model of the next leg, which has no adapters."""
        self.leg += 1
        self.key, lines = self.legs[self.leg]
        self.begins, self.ends = self.ends, self.ends + lines
        self.stage, self.adapters, self.encode_start = "waiting", (), 0.0

    @property
    def ahead(self) -> list[tuple[Key, int]]:
        """The keys of this leg and of those after it, with their passes that are still to come."""
        later = [(key, self.each * lines) for key, lines in self.legs[self.leg + 1 :]]
        return [(self.key, self.remaining - sum(passes for _, passes in later)), *later]

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
        """The line that its next work computes, -1 for the first encode; a later encode counts as the line after it."""
        return self.request.id, self.index, -1 if self.stage == "waiting" and not self.begun else self.line

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
            queue=self.queued,
            encode=self.encoded,
            denoise=self.decode_start - self.arrived - self.queued - self.encoded,
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


class Patience:
    """Announces each work with the seconds that it may take.

    An estimate is the longest that such a work took in this process, never a number from a file. On a CPU LEAST and
    MOST are for each gigabyte of the model's weights, and before there is an estimate, MOST for each 256 x 256 pixels
    too. A GPU, whose kernels are loaded at first use, has FIRST_ON_GPU seconds, those that compile COMPILING.
    """

    def __init__(self, pool: Pool, emit: Callable[[Report], None], clock: Callable[[], float], compiled: bool) -> None:
        self._pool, self._emit, self._clock, self._compiled = pool, emit, clock, compiled
        self._plain = pool.device.type == "cpu" and not compiled
        self._longest: dict[tuple[Key, str], tuple[float, int]] = {}
        self._announced, self._announced_at = Announce("start", 0.0), 0.0

    def forget(self, model: str) -> None:
        """Drop the estimates of a model that was loaded again: its weights may have to come from the disk once more."""
        self._longest = {at: longest for at, longest in self._longest.items() if at[0].model != model}

    def idle(self) -> None:
        """Announce that there is nothing to do. Call it again and again."""
        self._announce("idle", IDLE)

    def begin(self, work: Work) -> None:
        """Announce a work. The next width of a profile is twice the last, and networks compile meanwhile."""
        compiling = self._compiled and work.phase == "profile"
        self._announce(work.phase, COMPILING if compiling else self._limit(work.key, work.phase, work.passes or 2))

    def end(self, work: Work) -> None:
        """Learn from a work; one that failed, or found all of its texts encoded, says nothing of the next."""
        known = work.text_hits > 0
        if work.failed or work.error or work.idle or (known and not work.text_misses):
            return
        size = 1 if known or work.phase == "profile" else work.passes
        longest, widest = self._longest.get((work.key, work.phase), (0.0, size))
        faded = FADING * longest
        self._longest[work.key, work.phase] = (work.seconds, size) if work.seconds >= faded else (faded, widest)

    def _limit(self, key: Key, phase: str, size: int) -> float:
        longest = self._longest.get((key, phase))
        if longest is None and not self._plain:
            return COMPILING if self._compiled else FIRST_ON_GPU
        # Gigabytes of weights where the system may have dropped them from memory.
        large = max(1.0, self._pool.size(key.model) / 1e9) if self._plain else 1.0
        if longest is None:
            return math.ceil(MOST * large * max(1.0, size * key.width * key.height / FIRST_AREA))
        estimate = longest[0] * max(1.0, size / longest[1])
        least = LEAST * large if self._plain else MOST
        return math.ceil(max(LONG * estimate, min(MOST * large, max(least, FACTOR * estimate))))

    def _announce(self, phase: str, seconds: float) -> None:
        """Emit a change, or the same again when a third of it is gone; a Tick is a sign of life by itself."""
        fresh, now = Announce(phase, seconds), self._clock()
        if fresh != self._announced or now - self._announced_at >= seconds / 3:
            self._announced, self._announced_at = fresh, now
            self._emit(fresh)


def rows_of(request: Request, cards: Mapping[str, Card], now: float, numbers: Iterator[int]) -> list[Row]:
    """One waiting row for each image that is not done, numbered in order of arrival.

    Raises ModelNotFound, InvalidValue.
    """
    recipe, delivery = request.recipe, request.delivery
    for model in recipe.models:
        if model not in cards:
            raise ModelNotFound(f"there is no model {model}", param="model" if model == recipe.model else "refiner")
    tables = cards[recipe.model].legs(recipe)
    legs = tuple((_key(recipe, cards[model]), table.lines) for model, table in tables.items())
    key, lines = legs[0][0], sum(own for _, own in legs)
    skipping = recipe.skipping(lines, next(iter(tables.values())).first)
    arrived, apart = now if delivery.arrived is None else delivery.arrived, dict(delivery.apart)
    return [
        Row(request, index, key, lines, arrived, next(numbers), legs, skipping=skipping, apart=apart.get(index, -2))
        for index in range(len(request.images))
        if index not in delivery.done
    ]


def _key(recipe: Recipe, card: Card) -> Key:
    """The key of the leg that this card's model draws; a refiner's texts are as long as its card has them."""
    own = recipe.key
    return own if card.id == own.model else own._replace(model=card.id, text_length=card.text_length)
