"""Profile: the measured seconds of a forward against its passes, for one key on one device; kept on disk.

Knows nothing of rows or of order: it measures, and keeps what was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from app.cards.files import read_file
from app.engine.curve import WIDEST, Curve
from app.families.base import Family
from app.request import Key

NEAR_AREA = 1.25
"""A size whose area is within this factor of a measured one takes its profile, scaled."""

SAMPLES = 3

MOST_BYTES = 64 << 10
"""A file of a profile that is larger is not read."""

POSSIBLE = (1e-6, 3600.0)
"""Seconds that a forward can take."""


def measuring(
    forward: Callable[[int], None],
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[int, float]]:
    """Seconds of forward(passes) at 1, 2, 4, ... until two doublings bring nothing or `budget` seconds are spent.

    Yields what is known after each width, so that others may run in between. Each is the least of a few: whatever else
    the machine does can only add to a measurement. A width that does not fit in memory ends it too. Raises what the
    very first forward raises.
    """
    seconds: dict[int, float] = {}
    passes, spent, samples = 1, 0.0, 1 + SAMPLES
    while passes <= WIDEST:
        start = clock()
        try:
            seconds[passes] = min(_once(forward, passes, clock) for _ in range(samples))
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


def _once(forward: Callable[[int], None], passes: int, clock: Callable[[], float]) -> float:
    begin = clock()
    forward(passes)
    return clock() - begin


class Profiles:
    """Measured profiles by card and size, one JSON file each in `folder`, made on first need.

    A file is good for one card, size, device, dtype, torch version and thread count; text is as long as the card's. A
    size near one already measured is not measured: it is scaled by area, so that a client who asks for every size
    there is does not stop the others each time.

    What a file says is a first guess: it may have been measured while the machine was busy. The curve that is made of
    it learns from real forwards, and `keep` writes what it has learned.

    compiled: networks compile in their first forwards, so a key is measured at every start and nothing is read or kept:
    the compiling happens while measuring, which announces itself, and not in the midst of a request.
    """

    def __init__(self, folder: Path, budget: float = 5.0, *, compiled: bool = False) -> None:
        self._folder = None if compiled else folder.expanduser()
        self._budget = budget
        self._known: dict[str, dict[int, dict[int, float]]] = {}
        self._open: dict[Key, Iterator[dict[int, float]]] = {}
        self._widths: dict[Key, dict[int, float]] = {}

    def known(self, family: Family, key: Key) -> Curve | None:
        """A curve measured before, scaled from a near size, or from disk; None when the key is to be measured."""
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
        """Measure one more width, with the network on the device; the curve when that was the last.

        Raises what the first forward raises.
        """
        if key not in self._open:
            self._open[key] = measuring(_forward(family, key), self._budget)
        steps = self._open[key]
        try:
            self._widths[key] = next(steps)
            return None
        except StopIteration:
            del self._open[key]
            seconds = self._widths.pop(key)
        except BaseException:
            del self._open[key]
            raise
        self.keep(family, key, curve := Curve(seconds))
        return curve

    def keep(self, family: Family, key: Key, curve: Curve) -> None:
        """Remember this of a key, on disk too. Where the folder cannot be written, the next start measures again."""
        self._known.setdefault(key.model, {})[key.width * key.height] = curve.widths
        if file := self._file(family, key):
            _store(file, curve.widths)

    def forget(self, model: str) -> None:
        """Drop what is known of a model in memory, and a measurement of it that is not at its end."""
        self._known.pop(model, None)
        self._open = {key: steps for key, steps in self._open.items() if key.model != model}

    def _file(self, family: Family, key: Key) -> Path | None:
        return self._folder / "profiles" / (self._name(family, key) + ".json") if self._folder else None

    @staticmethod
    def _name(family: Family, key: Key) -> str:
        device = torch.cuda.get_device_name(family.device) if family.device.type == "cuda" else processor()
        facts = hashlib.sha256(family.card.model_dump_json(exclude={"folder"}).encode()).hexdigest()[:8]
        parts = (
            key.model, facts, f"{key.width}x{key.height}", device, str(family.dtype).split(".")[-1],
            f"torch{torch.__version__}", f"threads{torch.get_num_threads()}",
        )  # fmt: skip
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(parts))


def processor() -> str:
    """The model name of this CPU; "cpu" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def _stored(file: Path) -> dict[int, float] | None:
    """A stored profile; None when there is none or it makes no sense: anybody may have written into the folder."""
    try:
        stored = json.loads(read_file(file, MOST_BYTES))
        seconds = {int(passes): float(cost) for passes, cost in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return None
    low, high = POSSIBLE
    sound = seconds and all(1 <= passes <= WIDEST and low <= cost <= high for passes, cost in seconds.items())
    return seconds if sound else None


def _store(file: Path, seconds: dict[int, float]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(seconds), encoding="utf-8")
        fresh.replace(file)
    except OSError:
        return


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
