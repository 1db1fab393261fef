"""Profile: what a forward of one key costs by its passes: measured once, kept on disk, learned from every forward."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import time
import timeit
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter

from app.cards.files import read_file
from app.families.base import Family
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

MOST_BYTES = 64 << 10
"""A file of a profile that is larger is not read."""

_WIDTHS = TypeAdapter(dict[Annotated[int, Field(ge=1, le=WIDEST)], Annotated[float, Field(ge=1e-6, le=3600)]])
"""A file of a profile: seconds that a forward can take, by its passes."""


class Curve:
    """Seconds of a forward: a pace, which follows the load of the machine, times a shape, which does not.

    The shape is one number for each doubling of the passes: how many times as long the wider forward takes, as the
    median of the last KEPT samples. A sample compares two forwards that ran close together, so that a busy neighbour
    slows both. The measured profile, which may be from a bad moment, is the first sample of each doubling.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        """seconds: of a forward by its passes, at least one."""
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


class Profiles:
    """Measured profiles by card and size, one JSON file each in `folder`, made on first need.

    A file is valid for one card, size, device, dtype, torch version and thread count; text is as long as the card's. A
    size near one already measured is scaled by area, so that a client who asks for every size there is does not stop
    the others each time. A file is a first guess, perhaps of a busy machine: its curve learns from real forwards.

    compiled: networks compile in their first forwards, so a key is measured at every start, from no file: the compiling
    happens while measuring, which announces itself, and not in the midst of a request.
    """

    def __init__(self, folder: Path, budget: float = 5.0, *, compiled: bool = False) -> None:
        self._folder = None if compiled else folder.expanduser()
        self._budget = budget
        self._known: dict[str, dict[int, dict[int, float]]] = {}
        self._open: dict[Key, tuple[Iterator[dict[int, float]], dict[int, float]]] = {}

    def known(self, family: Family, key: Key) -> Curve | None:
        """A curve measured before, scaled from a near size, or from disk; None when the key must be measured."""
        known, area = self._known.setdefault(key.model, {}), key.width * key.height
        near = min(known, key=lambda other: abs(math.log(other / area)), default=None)
        if near is not None and abs(math.log(near / area)) <= math.log(NEAR_AREA):
            return Curve({passes: cost * area / near for passes, cost in known[near].items()})
        stored = _stored(file) if (file := self._file(family, key)) else None
        if stored is None:
            return None
        known[area] = stored
        return Curve(stored)

    def advance(self, family: Family, key: Key) -> Curve | None:
        """Measure one more width, with the network on the device; the curve when that was the last. Raises what the
        first forward raises."""
        opened = self._open.pop(key, None)
        steps, seconds = opened or (measuring(_forward(family, key), self._budget), {})
        if more := next(steps, None):
            self._open[key] = steps, more
            return None
        self.keep(family, key, curve := Curve(seconds))
        return curve

    def keep(self, family: Family, key: Key, curve: Curve) -> None:
        """Keep the curve of a key, on disk too. Where the folder cannot be written, the next start measures again."""
        self._known.setdefault(key.model, {})[key.width * key.height] = curve.widths
        if file := self._file(family, key):
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                fresh = file.with_suffix(f".{os.getpid()}")
                fresh.write_text(json.dumps(curve.widths), encoding="utf-8")
                fresh.replace(file)

    def forget(self, model: str) -> None:
        """Drop what is known of a model in memory, and a measurement of it that has not ended."""
        self._known.pop(model, None)
        self._open = {key: measured for key, measured in self._open.items() if key.model != model}

    def _file(self, family: Family, key: Key) -> Path | None:
        if not self._folder:
            return None
        device = torch.cuda.get_device_name(family.device) if family.device.type == "cuda" else processor()
        facts = hashlib.sha256(family.card.model_dump_json(exclude={"folder"}).encode()).hexdigest()[:8]
        parts = (
            key.model, facts, f"{key.width}x{key.height}", device, str(family.dtype).split(".")[-1],
            f"torch{torch.__version__}", f"threads{torch.get_num_threads()}",
        )  # fmt: skip
        return self._folder / "profiles" / (re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(parts)) + ".json")


def processor() -> str:
    """The model name of this CPU; "cpu" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def _stored(file: Path) -> dict[int, float] | None:
    """A stored profile; None when there is none or it makes no sense: anybody may have written into the folder."""
    try:
        return _WIDTHS.validate_json(read_file(file, MOST_BYTES)) or None
    except (OSError, ValueError):
        return None


def _forward(family: Family, key: Key) -> Callable[[int], None]:
    conditions = family.blank(family.card.text_length)
    shape = family.latent_shape(key.width, key.height)

    def run(passes: int) -> None:
        x = torch.randn(passes, *shape, device=family.device)
        t = torch.full((passes,), 500.0, device=family.device)
        family.denoise(x, t, {name: value.expand(passes, *value.shape[1:]) for name, value in conditions.items()})
        if family.device.type == "cuda":
            torch.cuda.synchronize(family.device)

    return run
