"""The order of work, beside a simulation made before: `python -m tests.bench.order [--requests 600]`.

The real Engine, Batcher and Runner on a clock that a network of known cost moves: a forward of n passes takes
a + b n seconds, so that its best cost per pass is within a tenth at the published width; encodes and decodes take none.
Row caps come from that profile by the engine's own rule. Beside it: first come first served one at a time, and static
batches of the oldest request and its equals in the queue, of the same cap, run to their end. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, NamedTuple

from app.engine.costs import Curve, caps_of
from app.report import Result
from tests.parts.engine import Bench, Costly, FakeCosts, FakePool, card, request

SHORT, LONG = ("flow_euler", 4, True), ("flow_euler", 50, True)
PAIR = (SHORT, LONG)
MANY = tuple(
    [("flow_euler", steps, place % 2 == 0) for place, steps in enumerate((4, 8, 12, 20, 28, 50))]
    + [("flow_dpmpp_2m", steps, place % 2 == 1) for place, steps in enumerate((4, 8, 12, 20, 28, 50))]
    + [("flow_heun", 10, False)]
)
"""13 kinds of request: sampler, steps, guided; 7 of them unguided."""

Kind = tuple[str, int, bool]


class Cost(NamedTuple):
    """A forward of n passes takes a + b n seconds."""

    a: float
    b: float

    def __call__(self, passes: int) -> float:
        return self.a + self.b * passes


def cost_of(width: int, milliseconds: float) -> Cost:
    """`milliseconds` a pass in forwards of `width` passes, where that is a tenth above the best."""
    b = milliseconds / 1e3 / 1.1
    return Cost(0.1 * width * b, b)


class Job(NamedTuple):
    """A request and when it comes."""

    kind: Kind
    arrives: float

    @property
    def lines(self) -> int:
        sampler, steps, _ = self.kind
        return 2 * steps - 1 if sampler == "flow_heun" else steps

    @property
    def passes(self) -> int:
        return 2 if self.kind[2] else 1


def curve(cost: Cost) -> dict[int, float]:
    return {passes: cost(passes) for passes in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)}


def cap_of(cost: Cost) -> int:
    """Passes of a full forward, as the engine takes them from the profile."""
    return caps_of(Curve(curve(cost)), card(), (4, 4, 4), 1, deterministic=False).passes


def continuous(jobs: Sequence[Job], cost: Cost) -> list[float]:
    """When each job ends, by the engine."""
    clock, profiles = [0.0], FakeCosts()
    profiles.curve = curve(cost)
    bench = Bench(FakePool(Costly(cost, clock)), costs=profiles, clock=lambda: clock[0])
    ends: dict[int, float] = {}
    coming = 0
    while len(ends) < len(jobs):
        while coming < len(jobs) and jobs[coming].arrives <= clock[0]:
            sampler, steps, guided = jobs[coming].kind
            facts: dict[str, Any] = {"sampler": sampler, "steps": steps, "guided": guided, "keep_latents": False}
            bench.engine.submit(request(str(coming), **facts))
            coming += 1
        worked = bench.engine.tick()
        ends |= {int(each.request_id): clock[0] for each in bench.reports if isinstance(each, Result)}
        bench.reports.clear()
        if not worked and coming < len(jobs):
            clock[0] = max(clock[0], jobs[coming].arrives)
    return [ends[number] for number in range(len(jobs))]


def static(jobs: Sequence[Job], cost: Cost, passes: int) -> list[float]:
    """When each job ends, in batches of the oldest and its equals; with `passes` 1, one at a time."""
    ends, waiting, now = [0.0] * len(jobs), list(range(len(jobs))), 0.0
    while waiting:
        head = jobs[waiting[0]]
        now = max(now, head.arrives)
        here = [n for n in waiting if jobs[n].kind == head.kind and jobs[n].arrives <= now]
        batch = here[: max(1, passes // head.passes)]
        now += head.lines * cost(len(batch) * head.passes)
        for n in batch:
            ends[n] = now
        waiting = [n for n in waiting if n not in batch]
    return ends


def poisson(kinds: Sequence[Kind], count: int, rate: float, seed: int = 1) -> list[Job]:
    """So many jobs a second of these kinds, in equal parts."""
    source, now, jobs = random.Random(seed), 0.0, []
    for _ in range(count):
        now += source.expovariate(rate)
        jobs.append(Job(source.choice(kinds), now))
    return jobs


def facts(jobs: Sequence[Job], ends: Sequence[float]) -> dict[str, float]:
    """Seconds from arrival to end, of all, of those of 4 steps and of those of 50; jobs a second."""
    taken = [end - job.arrives for job, end in zip(jobs, ends, strict=True)]
    short = [seconds for job, seconds in zip(jobs, taken, strict=True) if job.kind[1] == 4]
    long = [seconds for job, seconds in zip(jobs, taken, strict=True) if job.kind[1] == 50]
    found = {
        "p50": statistics.median(taken), "mean": statistics.fmean(taken),
        "short_p95": statistics.quantiles(short, n=20)[-1], "long_mean": statistics.fmean(long),
        "long_worst": max(long), "jobs_per_s": len(jobs) / (max(ends) - jobs[0].arrives),
    }  # fmt: skip
    return {name: round(value, 4) for name, value in found.items()}


def compare(kinds: Sequence[Kind], count: int, cost: Cost, load: float) -> dict[str, dict[str, float]]:
    """The three at `load` of the capacity of static batching, which is measured with 200 queued from the start."""
    passes = cap_of(cost)
    ways: dict[str, Callable[[Sequence[Job]], list[float]]] = {
        "continuous": lambda jobs: continuous(jobs, cost),
        "static": lambda jobs: static(jobs, cost, passes),
        "single": lambda jobs: static(jobs, cost, 1),
    }
    queued = [Job(job.kind, 0.0) for job in poisson(kinds, 200, 1.0)]
    capacity = {name: len(queued) / max(way(queued)) for name, way in ways.items()}
    jobs = poisson(kinds, count, load * capacity["static"])
    found = {name: facts(jobs, way(jobs)) | {"capacity": round(capacity[name], 4)} for name, way in ways.items()}
    return {"setting": {"passes": passes, "load": load, "requests": count}, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=600)
    count = parser.parse_args().requests
    found = {
        "sd35_large_1024_pair": compare(PAIR, count, cost_of(2, 38.9), 0.73),
        "dit_256_13_kinds": compare(MANY, count, cost_of(14, 0.30), 0.9),
    }
    for name, ways in found.items():
        print(f"\n{name}  {ways['setting']}")
        for way, each in ways.items():
            if way != "setting":
                print(f"  {way:11}" + "   ".join(f"{key} {value:.3f}" for key, value in each.items()))
    print("\nsimulated before: pair: short p95 27 -> 0.44 s, mean 1.5x, long +3 %; 13 kinds: p50 3.3x of static's")
    print(json.dumps({"bench": "order", "date": str(date.today()), **found}))


if __name__ == "__main__":
    main()
