"""Limits of a work, by what such works took: how much of a key goes at once, and how long before it counts as hung."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch

from app.cards.card import Card
from app.engine.profile import WIDEST, Curve, Profiles
from app.engine.row import Caps, Outcome, Work
from app.engine.slots import PASSES
from app.families.base import Family
from app.pool.pool import Pool
from app.report import Announce, Report
from app.request import Key

SLOT_BYTES = 256 << 20
"""Most bytes that the slots of one key take: latents (x, mem, noise) and conditions."""

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


def caps_of(curve: Curve, card: Card, latent: tuple[int, ...], slot_bytes: int, deterministic: bool) -> Caps:
    """The caps that go with this curve; in deterministic mode the card's bucket decides the widths.

    latent: [C, h, w] of an image. slot_bytes: of one slot. There are slots for what memory allows, whatever the cap is:
    it moves while rows hold them.
    """
    # At 1024 px the VAE is the memory peak, so its batch shrinks with the image.
    decode = max(1, min(8, 16_384 // (latent[1] * latent[2])))
    slots = max(4, min(4 * WIDEST + 4, SLOT_BYTES // slot_bytes))
    rate, bucket = curve.cost(curve.cap) / curve.cap, card.bucket
    if deterministic:
        slots = min(slots, 4 * bucket.passes)
        return Caps(bucket.passes, bucket.encode, bucket.decode, slots, rate, (slots + 1) * slot_bytes)
    return Caps(curve.cap, curve.cap, decode, slots, rate, (slots + 1) * slot_bytes)


class Capacity:
    """The caps of every measured key, and the cost curves that they come from. Deterministic mode learns nothing."""

    def __init__(self, pool: Pool, profiles: Profiles, deterministic: bool) -> None:
        self.known: dict[Key, Caps] = {}
        self._pool, self._profiles, self._deterministic = pool, profiles, deterministic
        self._curves: dict[Key, Curve] = {}
        self._gpu = pool.device.type == "cuda"
        self._timed: deque[tuple[Key, int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def caps(self, key: Key) -> Caps | None:
        """The caps of a key and the wider forward that is worth a try; None before the key is measured."""
        caps = self.known.get(key)
        trial = self._curves[key].trial() if caps and not self._deterministic else 0
        return replace(caps, trial=trial) if caps and trial else caps

    def forget(self, model: str) -> None:
        """Drop what was learned of a model, whose files may be others when it comes back."""
        self._profiles.forget(model)
        for key in [key for key in self.known if key.model == model]:
            del self.known[key], self._curves[key]

    def measurable(self, key: Key) -> bool:
        """Whether `measure` would get on: the key is not measured, and its network, or its stored profile, is there."""
        family = self._pool.family(key.model)
        if family is None or key in self.known:
            return False
        return self._pool.resident(key.model, "denoise") or self._profiles.known(family, key) is not None

    def measure(self, key: Key) -> None:
        """Find the caps of a key from its stored profile, or measure one more width of it.

        Does nothing where the model or its network is not there. Raises what the first forward raises.
        """
        family = self._pool.family(key.model)
        curve = self._profiles.known(family, key) or self._advance(family, key) if family else None
        if family is None or curve is None:
            return
        latent = family.latent_shape(key.width, key.height)
        conditions = family.blank(key.text_length)
        slot_bytes = 12 * math.prod(latent) + PASSES * sum(value.nbytes for value in conditions.values())
        self._curves[key] = curve
        self.known[key] = caps_of(curve, family.card, latent, slot_bytes, self._deterministic)

    def learn(self, key: Key, passes: int, seconds: float, now: float) -> None:
        """Learn from a forward that took `seconds` by the host's clock and ended at `now`: the cap widens or narrows.

        On a GPU the host's clock shows how long the launch took, so there the times of `timing` count.
        """
        timed = self._ended() if self._gpu else iter([(key, passes, seconds)])
        for key, passes, seconds in timed:
            curve, family = self._curves.get(key), self._pool.family(key.model)
            if curve is None or family is None or self._deterministic:
                continue
            if curve.learn(passes, seconds, now):
                self._profiles.keep(family, key, curve)
            rate = curve.cost(curve.cap) / curve.cap
            self.known[key] = replace(self.known[key], passes=curve.cap, encode=curve.cap, rate=rate)

    def refuse(self, key: Key, passes: int) -> None:
        """A forward of so many passes did not fit in memory, and was run in parts."""
        if key in self._curves:
            self._curves[key].refuse(passes)

    def timing(self, key: Key, passes: int) -> AbstractContextManager[None]:
        """Time the forward that is launched inside; only a GPU needs it."""
        return self._events(key, passes) if self._gpu else nullcontext()

    @contextmanager
    def _events(self, key: Key, passes: int) -> Iterator[None]:
        """A pair of CUDA events around a forward; one that raises is left out."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._timed.append((key, passes, start, end))

    def _ended(self) -> Iterator[tuple[Key, int, float]]:
        """Key, passes and seconds of the forwards that the GPU has ended since the last call; waits for none."""
        while self._timed and self._timed[0][-1].query():  # type: ignore[no-untyped-call]
            key, passes, start, end = self._timed.popleft()
            yield key, passes, start.elapsed_time(end) / 1000

    def _advance(self, family: Family, key: Key) -> Curve | None:
        lease = self._pool.lease(key.model, "denoise")
        if lease is None:
            return None
        try:
            with torch.inference_mode():
                return self._profiles.advance(family, key)
        finally:
            lease.release()


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
        self._size = 0

    def forget(self, model: str) -> None:
        """Drop the estimates of a model that was loaded again: its weights may have to come from the disk once more."""
        self._longest = {at: longest for at, longest in self._longest.items() if at[0].model != model}

    def idle(self) -> None:
        """Announce that there is nothing to do. Call it again and again."""
        self._announce("idle", IDLE)

    def begin(self, work: Work) -> None:
        """Announce a work. The next width of a profile is twice the last, and networks compile meanwhile."""
        self._size = work.passes if work.phase == "denoise" else len(work.rows) or 2
        compiling = self._compiled and work.phase == "profile"
        self._announce(work.phase, COMPILING if compiling else self._limit(work.key, work.phase, self._size))

    def end(self, work: Work, outcome: Outcome, seconds: float) -> None:
        """Learn from a work; one that failed, or found all of its texts encoded, says nothing of the next."""
        known = outcome.text_hits > 0
        if not (outcome.failed or outcome.error or outcome.idle or (known and not outcome.text_misses)):
            least = known or work.phase == "profile"
            self._learn(work.key, work.phase, 1 if least else self._size, seconds)

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

    def _learn(self, key: Key, phase: str, size: int, seconds: float) -> None:
        longest, widest = self._longest.get((key, phase), (0.0, size))
        faded = FADING * longest
        self._longest[key, phase] = (seconds, size) if seconds >= faded else (faded, widest)

    def _announce(self, phase: str, seconds: float) -> None:
        """Emit a change, or the same again when a third of it is gone; a Tick is a sign of life by itself."""
        fresh, now = Announce(phase, seconds), self._clock()
        if fresh != self._announced or now - self._announced_at >= seconds / 3:
            self._announced, self._announced_at = fresh, now
            self._emit(fresh)
