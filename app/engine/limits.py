"""Limits: how much of each key the device does at once, by its measured profile and then by the forwards that run."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from app.cards.card import Card
from app.engine.curve import WIDEST, Curve
from app.engine.events import Events
from app.engine.outcome import ALONE
from app.engine.profile import Profiles
from app.engine.row import Caps
from app.engine.slots import PASSES
from app.errors import EngineError, OutOfMemory
from app.families.base import Family
from app.pool.pool import Pool
from app.request import Key

SLOT_BYTES = 256 << 20
"""Most bytes that the slots of one key take: latents (x, mem, noise) and conditions."""


def caps_of(curve: Curve, card: Card, latent: tuple[int, ...], slot_bytes: int, deterministic: bool) -> Caps:
    """The caps that go with this curve; in deterministic mode the card's bucket decides the widths.

    latent: [C, h, w] of an image. slot_bytes: of one slot. There are slots for what memory allows, whatever the cap is:
    it moves while rows hold them.
    """
    # DESIGN section 6 rule 6: at 1024 px the VAE is the memory peak, so its batch shrinks with the image.
    decode = max(1, min(8, 16_384 // (latent[1] * latent[2])))
    slots = max(4, min(4 * WIDEST + 4, SLOT_BYTES // slot_bytes))
    rate, bucket = curve.cost(curve.cap) / curve.cap, card.bucket
    if deterministic:
        slots = min(slots, 4 * bucket.passes)
        return Caps(bucket.passes, bucket.encode, bucket.decode, slots, rate, (slots + 1) * slot_bytes)
    return Caps(curve.cap, curve.cap, decode, slots, rate, (slots + 1) * slot_bytes)


class Limits:
    """The caps of every key that was measured, and the cost curves that they come from.

    In deterministic mode the card's bucket decides, and nothing is learned.
    """

    def __init__(self, pool: Pool, profiles: Profiles, deterministic: bool) -> None:
        self.known: dict[Key, Caps] = {}
        self._pool, self._profiles, self._deterministic = pool, profiles, deterministic
        self._curves: dict[Key, Curve] = {}
        self._events = Events() if pool.device.type == "cuda" else None

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

    def measure(self, key: Key) -> Caps | None:
        """Find the caps of a key from its stored profile, or measure one more width of it.

        None while there is more to measure, or the model or its network is not there. Raises EngineError: the first
        forward of this checkpoint fails, OutOfMemory: for want of room.
        """
        family = self._pool.family(key.model)
        if family is None:
            return None
        try:
            curve = self._profiles.known(family, key) or self._advance(family, key)
            if curve is None:
                return None
            latent = family.latent_shape(key.width, key.height)
            conditions = family.blank(key.text_length)
            bytes_ = 12 * math.prod(latent) + PASSES * sum(value.nbytes for value in conditions.values())
            self._curves[key] = curve
            self.known[key] = caps_of(curve, family.card, latent, bytes_, self._deterministic)
        except torch.AcceleratorError:
            raise
        except torch.OutOfMemoryError:
            raise OutOfMemory(ALONE) from None
        except Exception as error:
            raise EngineError(f"{type(error).__name__} in the first forward of {key.model}") from None
        return self.known[key]

    def learn(self, key: Key, passes: int, seconds: float, now: float) -> None:
        """A forward of so many passes took `seconds` by the host's clock and ended at `now`: widen or narrow the cap.

        On a GPU the host's clock says how long the launch took, so there the device's own times count.
        """
        timed = [(key, passes, seconds)] if self._events is None else self._events.finished()
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
        return self._events.around(key, passes) if self._events else nullcontext()

    def _advance(self, family: Family, key: Key) -> Curve | None:
        lease = self._pool.lease(key.model, "denoise")
        if lease is None:
            return None
        try:
            with torch.inference_mode():
                return self._profiles.advance(family, key)
        finally:
            lease.release()
