"""Timing: several ways to do one thing, in turns, and what their times were.

Knows nothing of what is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Seconds: the median of so many samples, the least and the most."""

    median: float
    least: float
    most: float
    samples: int


def spread(samples: Sequence[float]) -> Spread:
    return Spread(statistics.median(samples), min(samples), max(samples), len(samples))


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each name `rounds` times in the order A B B A: a machine that grows slower or faster does so for all alike."""
    for number in range(rounds):
        yield from names if number % 2 == 0 else reversed(names)


def alternate(ways: Mapping[str, Callable[[], float]], rounds: int, warm_ups: int = 2) -> dict[str, Spread]:
    """The spread of what each way returns, in seconds, over `rounds` calls after the warm-ups, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for name in turns(tuple(ways), warm_ups):
        ways[name]()
    for name in turns(tuple(ways), rounds):
        samples[name].append(ways[name]())
    return {name: spread(values) for name, values in samples.items()}
