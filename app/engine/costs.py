"""Costs: the seconds of a forward by its passes, measured once, kept on disk and learned; and the caps that follow."""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import time
import timeit
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter

from app.cards.card import Card
from app.cards.files import read_file
from app.engine.row import Caps
from app.engine.step import PASSES
from app.families.base import Family
from app.pool.budget import processor
from app.request import Key

NEAR = 1.10
"""A width is wide enough when its cost per pass is within this factor of the best known one."""

WIDEST = 64
"""Passes of the widest forward that is measured or tried."""

KEPT = 9
"""The last samples of a doubling, whose median counts."""

TRIES = 6
"""Samples from real forwards that a doubling must have before it is tried seldom only. A trial yields two: beside the
forward before it and beside the one after it."""

PATIENCE = 64
"""Forwards before a doubling that did not pay is tried again; twice as many after each time."""

CLOSE = 2.0
"""Seconds between two forwards whose times are compared, or CLOSE_FORWARDS times what they take, if that is longer."""
CLOSE_FORWARDS = 8

PACE = 0.05
"""How far the pace moves towards what a forward has just taken."""

OUTLIER = 4.0
"""A forward that takes so many times its estimate, or more, moves the pace as if it took that."""

NO_ROOM = 4.0
"""The sample of a doubling whose wider forward did not fit in memory: it is run in halves, and does not pay."""

NEAR_AREA = 1.25
"""A size whose area is within this factor of a measured one takes its profile, scaled."""

SAMPLES = 3

SLOT_BYTES = 256 << 20
"""Most bytes that the slots of one key take: latents (x, mem, noise) and conditions."""

MOST_BYTES = 64 << 10
"""A file of a profile that is larger is not read."""

_WIDTHS = TypeAdapter(dict[Annotated[int, Field(ge=1, le=WIDEST)], Annotated[float, Field(ge=1e-6, le=3600)]])
"""A file of a profile: seconds that a forward can take, by its passes."""

log = logging.getLogger("instep.worker")


class Curve:
    """Seconds of a forward: a pace, which follows the load of the machine, times a shape, which does not.

    The shape is one number for each doubling of the passes: how many times as long the wider forward takes, as the
    median of the last KEPT samples. A sample compares two forwards that ran close together, so that a busy neighbour
    slows both. The measured profile, which may be from a bad moment, is the first sample of each doubling.
    """

    def __init__(self, seconds: Mapping[int, float], scaled: bool = False) -> None:
        """seconds: of a forward by its passes, at least one. scaled: they are guessed from those of another size."""
        self.scaled = scaled
        self._base = min(seconds)
        self._pace = seconds[self._base]
        places = range(math.floor(math.log2(max(WIDEST, self._base) / self._base)))
        self._growth: list[deque[float]] = [deque(maxlen=KEPT) for _ in places]
        for place in places:
            if {self._width(place), self._width(place + 1)} <= seconds.keys():
                self._growth[place].append(max(1.0, seconds[self._width(place + 1)] / seconds[self._width(place)]))
        self._tried = [0 for _ in places]
        self._warm: set[int] = set()
        self._last, self._ended, self._took = -1, -math.inf, 0.0
        self._since, self._patience = 0, PATIENCE
        self.cap = self._find_cap()

    @property
    def widths(self) -> dict[int, float]:
        """Seconds of a forward at each known doubling of the least width, as a profile on disk has them."""
        known = max((place + 1 for place, samples in enumerate(self._growth) if samples), default=0)
        return {self._width(place): self.cost(self._width(place)) for place in range(known + 1)}

    def cost(self, passes: int) -> float:
        """Seconds of a forward of so many passes; beyond the known widths the cost of a pass stays as it is there."""
        place = math.log2(passes / self._base)
        whole = max(0, min(math.floor(place), len(self._growth)))
        shape = math.prod(self._step(doubling) for doubling in range(whole))
        return float(self._pace * shape * (self._step(whole) if place > 0 else 2.0) ** (place - whole))

    def trial(self) -> int:
        """Passes of a wider forward that is worth a try now, when rows nearly fill it; 0 when none is.

        It is twice as wide as the last forward, to be compared with it: as the cap, or as a single row that is wider
        than the cap where nothing is known of that doubling. A width known from a profile only is tried at once; one
        that did not pay after PATIENCE forwards, then after twice as many, and so on.
        """
        place, cap = self._last, self._place(self.cap)
        if not cap <= place < len(self._growth) or (place > cap and self._tried[place - 1]):
            return 0
        due = self._tried[place] < TRIES or self._since >= self._patience
        return self._width(place + 1) if due else 0

    def learn(self, passes: int, seconds: float, now: float) -> bool:
        """Learn from a forward that took `seconds` and ended at `now`, in seconds; return whether the cap has changed.

        The first of each width is ignored: libraries prepare kernels for a shape when they first see it.
        """
        self._since += 1
        if passes not in self._warm:
            self._warm.add(passes)
            return False
        place, expected = self._place(passes), self.cost(passes)
        between = max(0, math.floor(math.log2(passes / self._base)))
        self._pace *= 1 + PACE * (min(seconds / expected, OUTLIER) - 1)
        here = seconds * (self._width(place) / passes) ** math.log2(min(2.0, self._step(between)))
        if abs(place - self._last) == 1 and now - self._ended <= max(CLOSE, CLOSE_FORWARDS * (here + self._took)):
            self._compare(min(place, self._last), here / self._took if place > self._last else self._took / here)
        self._last, self._ended, self._took = place, now, here
        before, self.cap = self.cap, self._find_cap()
        if self.cap != before:
            self._since, self._patience = 0, PATIENCE
        return self.cap != before

    def refuse(self, passes: int) -> None:
        """Count a forward that did not fit in memory as a trial that did not pay."""
        self._compare(self._place(passes) - 1, NO_ROOM)

    def _compare(self, place: int, growth: float) -> None:
        """Add a sample of a doubling."""
        if not 0 <= place < len(self._growth):
            return
        self._growth[place].append(max(1.0, growth))
        self._tried[place] += 1
        if place >= self._place(self.cap) and self._tried[place] > TRIES and self._since >= self._patience:
            self._since, self._patience = 0, 2 * self._patience

    def _find_cap(self) -> int:
        """The least known width whose cost per pass is within NEAR of the best known one."""
        each = {passes: seconds / passes for passes, seconds in self.widths.items()}
        return min(passes for passes, cost in each.items() if cost <= NEAR * min(each.values()))

    def _step(self, place: int) -> float:
        """How many times as long the doubling at `place` takes; 2, a pass costs the same, where nothing is known.

        One without samples of real forwards takes no more than the next that has some: width pays ever less.
        """
        own = self._growth[place : place + 1]
        known = [median_low(samples) for samples in own if samples]
        if own and not self._tried[place]:
            later = zip(self._growth[place:], self._tried[place:], strict=True)
            known += itertools.islice((median_low(samples) for samples, tried in later if tried), 1)
        return min(known, default=2.0)

    def _width(self, place: int) -> int:
        return self._base << place

    def _place(self, passes: int) -> int:
        return round(math.log2(passes / self._base))


def measuring(
    forward: Callable[[int], None],
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[int, float]]:
    """Seconds of forward(passes) at 1, 2, 4, ... until two doublings bring nothing or `budget` seconds are spent.

    Yields all that is known after each width, so that others may run in between. Each is the least of a few, because
    other processes only add to it. A width that does not fit in memory ends it too. Raises what the first forward does.
    """
    seconds: dict[int, float] = {}
    passes, spent, samples = 1, 0.0, 1 + SAMPLES
    while passes <= WIDEST:
        start = clock()
        try:
            seconds[passes] = min(timeit.repeat(partial(forward, passes), timer=clock, number=1, repeat=samples))
        except torch.OutOfMemoryError:
            if passes == 1:
                raise
            return
        yield dict(seconds)
        spent += clock() - start
        best = min(seconds, key=lambda width: seconds[width] / width)
        next_costs = 2 * seconds[passes] * samples
        if passes >= 4 * best or spent + next_costs > budget:
            return
        passes *= 2


def caps_of(curve: Curve, card: Card, latent: tuple[int, ...], slot_bytes: int, deterministic: bool) -> Caps:
    """The caps that go with this curve; in deterministic mode the card's bucket decides the widths.

    latent: [C, h, w] of an image. slot_bytes: of one slot. There are slots for what memory allows, whatever the cap is:
    it moves while rows hold them.
    """
    # At 1024 px the VAE is the memory peak, so its batch shrinks with the image.
    decode = max(1, min(8, 16_384 // (latent[1] * latent[2])))
    slots = max(4, min(4 * WIDEST + 4, SLOT_BYTES // slot_bytes))
    passes, encode, bucket = curve.cap, curve.cap, card.bucket
    if deterministic:
        slots = min(slots, 4 * bucket.passes)
        passes, encode, decode = bucket.passes, bucket.encode, bucket.decode
    return Caps(passes, encode, decode, slots, curve.cost(curve.cap) / curve.cap, (slots + 1) * slot_bytes)


class Costs:
    """Curves and caps of the keys that were measured. Each profile is a JSON file in `folder`, made on first need.

    A file is valid for one card, size, device, dtype, torch version and thread count; text is as long as the card's. A
    size near one already measured is scaled by area, so that a client who asks for every size there is does not stop
    the others each time. A file is a first guess, perhaps of a busy machine: its curve learns from real forwards. In
    deterministic mode only the rate does.

    compiled: networks compile in their first forwards, so a key is measured at every start, from no file: the compiling
    happens while measuring, which announces itself, and not in the midst of a request. budget: seconds that a
    measurement may take.
    """

    def __init__(
        self, folder: Path, *, deterministic: bool = False, compiled: bool = False, budget: float = 5.0
    ) -> None:
        self.deterministic = deterministic
        self.caps: dict[Key, Caps] = {}
        self.curves: dict[Key, Curve] = {}
        self.measuring: dict[Key, tuple[Iterator[dict[int, float]] | None, dict[int, float]]] = {}
        self._folder = None if compiled else folder.expanduser()
        self._budget = budget
        self._files: dict[Key, Path | None] = {}
        self._timed: deque[tuple[Key, int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._warned: set[str] = set()

    def stored(self, family: Family, key: Key) -> Curve | None:
        """A curve scaled from a near size, or from disk; None when the key must be measured."""
        area = key.width * key.height
        # Only from sizes with times of their own: a chain of guesses would lead from any size to any other.
        own = ((one, curve) for one, curve in self.curves.items() if one.model == key.model and not curve.scaled)
        areas = {one.width * one.height: curve for one, curve in own}
        near = min(areas, key=lambda other: abs(math.log(other / area)), default=None)
        if near is not None and abs(math.log(near / area)) <= math.log(NEAR_AREA):
            return Curve({passes: cost * area / near for passes, cost in areas[near].widths.items()}, scaled=True)
        seconds = self._read(file) if (file := self._file(family, key)) else None
        return Curve(seconds) if seconds else None

    def _read(self, file: Path) -> dict[int, float] | None:
        """A stored profile; None when there is none or it makes no sense: anybody may have written into the folder."""
        try:
            return _WIDTHS.validate_json(read_file(file, MOST_BYTES)) or None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self._warn("read", file, getattr(error, "strerror", None) or "it is not the JSON of a profile")
            return None

    def _warn(self, deed: str, file: Path, reason: object) -> None:
        """Log what is wrong with the folder, once for reading and once for writing."""
        if deed not in self._warned:
            self._warned.add(deed)
            log.warning("CACHE: %s cannot be %s (%s); it is measured at every start", file, deed, reason)

    def recall(self, family: Family, key: Key) -> bool:
        """Take the stored curve of a key, if there is one."""
        curve = self.stored(family, key)
        if curve:
            self.add(family, key, curve)
        return curve is not None

    def measure(self, family: Family, key: Key) -> None:
        """Measure one more width of a key, with the network on the device; the last one makes its caps.

        Raises what the first forward raises.
        """
        steps, seconds = self.measuring.pop(key, (None, {}))
        steps = steps or measuring(forward_of(family, key), self._budget)
        if more := next(steps, None):
            self.measuring[key] = steps, more
            return
        self.add(family, key, Curve(seconds))
        self.keep(key)

    def add(self, family: Family, key: Key, curve: Curve) -> None:
        """Use this curve for a key from now on."""
        latent, conditions = family.latent_shape(key.width, key.height), family.blank(key.text_length)
        slot_bytes = 12 * math.prod(latent) + PASSES * sum(value.nbytes for value in conditions.values())
        self.curves[key], self._files[key] = curve, self._file(family, key)
        self.caps[key] = caps_of(curve, family.card, latent, slot_bytes, self.deterministic)

    def learn(self, key: Key, passes: int, seconds: float, now: float) -> None:
        """Learn from a forward that took `seconds` by the host's clock and ended at `now`: the cap widens or narrows.

        On a GPU the host's clock shows how long the launch took, so there the times of `timing` count.
        """
        for timed, width, took in self._ended() if self._timed else [(key, passes, seconds)]:
            curve, caps = self.curves.get(timed), self.caps.get(timed)
            if curve is None or caps is None:
                continue
            if self.deterministic:  # every forward is as wide as the bucket, but takes what the machine makes of it
                each = took / max(width, caps.passes)
                caps.rate += PACE * (min(each, OUTLIER * caps.rate) - caps.rate)
                continue
            if curve.learn(width, took, now):
                self.keep(timed)
            caps.passes = caps.encode = curve.cap
            caps.rate, caps.trial = curve.cost(curve.cap) / curve.cap, curve.trial()

    def refuse(self, key: Key, passes: int) -> None:
        """A forward of so many passes did not fit in memory, and was run in parts."""
        if key in self.curves:
            self.curves[key].refuse(passes)
            self.caps[key].trial = 0 if self.deterministic else self.curves[key].trial()

    @contextmanager
    def timing(self, key: Key, passes: int, device: torch.device) -> Iterator[None]:
        """Time the forward that is launched inside, on a GPU with a pair of events; one that raises is left out."""
        if device.type != "cuda":
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._timed.append((key, passes, start, end))

    def forget(self, model: str) -> None:
        """Drop what was learned of a model, whose files may be others when it comes back."""
        for kept in (self.caps, self.curves, self.measuring, self._files):
            for key in [key for key in kept if key.model == model]:
                del kept[key]

    def _ended(self) -> Iterator[tuple[Key, int, float]]:
        """Key, passes and seconds of the forwards that the GPU has ended since the last call; waits for none."""
        while self._timed and self._timed[0][-1].query():  # type: ignore[no-untyped-call]
            key, passes, start, end = self._timed.popleft()
            yield key, passes, start.elapsed_time(end) / 1000

    def keep(self, key: Key) -> None:
        """Write a profile. Where the folder cannot be written, the next start measures again."""
        self.curves[key].scaled = False
        if file := self._files[key]:
            fresh = file.with_suffix(f".{os.getpid()}")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                fresh.write_text(json.dumps(self.curves[key].widths), encoding="utf-8")
                fresh.replace(file)
            except OSError as error:
                self._warn("written", file, error.strerror)
                with contextlib.suppress(OSError):
                    fresh.unlink()

    def _file(self, family: Family, key: Key) -> Path | None:
        if not self._folder:
            return None
        device = torch.cuda.get_device_name(family.device) if family.device.type == "cuda" else processor()
        facts = hashlib.sha256(family.card.model_dump_json(exclude={"folder"}).encode()).hexdigest()[:8]
        parts = (
            key.model, facts, key.size, device, str(family.dtype).split(".")[-1],
            f"torch{torch.__version__}", f"threads{torch.get_num_threads()}",
        )  # fmt: skip
        return self._folder / "profiles" / (re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(parts)) + ".json")


def forward_of(family: Family, key: Key) -> Callable[[int], None]:
    """A forward of this key, of so many passes, that is over when it returns."""
    conditions = family.blank(family.card.text_length)
    shape = family.latent_shape(key.width, key.height)

    def run(passes: int) -> None:
        x = torch.randn(passes, *shape, device=family.device)
        t = torch.full((passes,), 500.0, device=family.device)
        family.denoise(x, t, {name: value.expand(passes, *value.shape[1:]) for name, value in conditions.items()})
        if family.device.type == "cuda":
            torch.cuda.synchronize(family.device)

    return run
