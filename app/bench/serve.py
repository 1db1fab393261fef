"""Serve: policies side by side under load over loopback HTTP: capacity, then latency at a share of the baseline's.

Knows nothing of how the numbers are shown.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.bench.policies import POLICIES
from app.bench.process import forwards, serving
from app.bench.replay import Address, Answer, ask, closed_loop, open_loop
from app.bench.timing import spread, turns
from app.bench.trace import Arrival, Trace, work_of
from app.errors import EngineError, InvalidValue
from app.settings import Settings

SAMPLES = 3
"""Requests of each kind of work that are timed alone, after one that warms up."""

PATIENCE = 3.0
"""Deadlines in multiples of a request's own service time alone, as in vLLM-Omni's diffusion_benchmark_serving.py."""

ALL = "all"
"""The name of all classes together."""


@dataclass(frozen=True)
class Plan:
    """What is compared. load: the share of the baseline's capacity at which the trace is replayed, for `seconds`.

    queued: requests of the closed loop. rounds: of both loops for each policy, in the order A B B A.
    """

    policies: tuple[str, ...] = ("continuous", "static")
    baseline: str = "static"
    load: float = 0.9
    queued: int = 200
    seconds: float = 60.0
    rounds: int = 2

    def check(self) -> None:
        """Raises InvalidValue on a policy that is not known, or a baseline that is not among those that run."""
        for name in self.policies:
            if name not in POLICIES:
                raise InvalidValue(f"policies: {name}: there are {', '.join(POLICIES)}", param="policies")
        if self.baseline not in self.policies:
            raise InvalidValue(
                f"baseline: {self.baseline} is not among the policies: {', '.join(self.policies) or 'none'}",
                param="baseline",
            )
        if not (math.isfinite(self.load) and math.isfinite(self.seconds)):
            raise InvalidValue("at-capacity, seconds: not a number that ends", param="seconds")


def compare(
    settings: Settings, model: str, trace: Trace, plan: Plan, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Every policy's capacity and latencies, and their ratios to the baseline's, as plain data. say: what is going on.

    All servers are up the whole time; only one of them works. Raises InvalidValue, and EngineError when a server does
    not get ready or does not answer a request that it gets alone.
    """
    plan.check()
    with ExitStack() as stack:
        servers = {}
        for name in plan.policies:
            say(f"{name}: starting")
            servers[name] = stack.enter_context(serving(name, settings, model))
        alone = _alone(servers, trace)
        before = {name: forwards(address) for name, address in servers.items()}
        capacity = _capacities(servers, trace, plan, say)
        rate = plan.load * statistics.median(capacity[plan.baseline][0])
        arrivals = trace.at_rate(rate, plan.seconds)
        if not arrivals:
            raise InvalidValue(f"seconds: nobody comes in {plan.seconds:g} s", param="seconds")
        answers = _replays(servers, arrivals, plan, say)
        shared = {name: _rows(before[name], forwards(address)) for name, address in servers.items()}
    limits = alone[plan.baseline]
    found = {
        name: {
            "capacity": spread(capacity[name][0])._asdict(),
            "alone": _by_class(trace, alone[name]),
            "rows": shared[name],
            "statuses": _statuses([*capacity[name][1], *answers[name]]),
            "latency": latencies(answers[name], limits),
            "client_late": max(one.late for one in answers[name]),
        }
        for name in servers
    }
    told = {"trace": trace.facts, "baseline": plan.baseline, "load": plan.load, "rate": rate, "queued": plan.queued}
    times = {"seconds": plan.seconds, "rounds": plan.rounds, "requests": len(arrivals)}
    return {**told, **times, "policies": found, "ratios": ratios(found, plan.baseline)}


def latencies(answers: Sequence[Answer], limits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By class and in all: how many, p50, p95, p99 and mean in seconds of the pictures that came, and the share of all
    requests whose picture came by its deadline. limits: seconds alone of each kind of work."""
    found = {}
    for kind in (ALL, *sorted({answer.arrival.kind for answer in answers})):
        own = [answer for answer in answers if kind in (ALL, answer.arrival.kind)]
        good = [answer for answer in own if answer.status == 200]
        seconds = [answer.seconds for answer in good]
        p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist() if seconds else (0.0, 0.0, 0.0)
        in_time = sum(answer.seconds <= _deadline(answer.arrival, limits) for answer in good)
        mean = statistics.fmean(seconds) if seconds else 0.0
        share = in_time / len(own) if own else 0.0
        found[kind] = {"count": len(own), "p50": p50, "p95": p95, "p99": p99, "mean": mean, "attainment": share}
    return found


def ratios(found: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """How much better than the baseline, above 1 is better: capacity over its, and its latencies over theirs.

    Only of policies that answered everything, as the baseline did: who loses its slow requests is not quicker.
    """
    base = found[baseline]
    whole = {name: one for name, one in found.items() if set(one["statuses"]) == {"200"}}
    return {
        name: {
            "capacity": one["capacity"]["median"] / base["capacity"]["median"],
            **{
                kind: {what: base["latency"][kind][what] / value[what] for what in ("p50", "p95", "p99", "mean")}
                for kind, value in one["latency"].items()
            },
        }
        for name, one in whole.items()
        if name != baseline and baseline in whole
    }


def _alone(servers: Mapping[str, Address], trace: Trace) -> dict[str, dict[str, float]]:
    """Median seconds of one request of each kind of work on each idle server, in turns, after one that warms up."""
    kinds = trace.kinds()
    found: dict[str, dict[str, list[float]]] = {name: {work: [] for work in kinds} for name in servers}
    for name, address in servers.items():
        for arrival in kinds.values():
            asyncio.run(_warm(name, address, arrival))
    for name in turns(tuple(servers), SAMPLES):
        for work, arrival in kinds.items():
            (answer,) = asyncio.run(open_loop(servers[name], [arrival._replace(at=0.0)]))
            found[name][work].append(answer.seconds)
    return {name: {work: statistics.median(times) for work, times in works.items()} for name, works in found.items()}


async def _warm(name: str, address: Address, arrival: Arrival) -> None:
    status, body = await ask(address, arrival)
    if status != 200:
        said = body[:300].decode(errors="replace")
        raise EngineError(f"{name}: the server answers {status} to {work_of(arrival.body)}: {said}")


def _capacities(
    servers: Mapping[str, Address], trace: Trace, plan: Plan, say: Callable[[str], None]
) -> dict[str, tuple[list[float], list[Answer]]]:
    """Pictures a second of each round, and every answer."""
    found: dict[str, tuple[list[float], list[Answer]]] = {name: ([], []) for name in servers}
    for name in turns(tuple(servers), plan.rounds):
        rate, answers = asyncio.run(closed_loop(servers[name], trace.first(plan.queued)))
        if not rate:
            raise EngineError(f"{name}: none of {plan.queued} requests was answered: {_statuses(answers)}")
        say(f"{name}: {plan.queued} queued, {rate:.2f} images/s")
        found[name][0].append(rate)
        found[name][1].extend(answers)
    return found


def _replays(
    servers: Mapping[str, Address], arrivals: Sequence[Arrival], plan: Plan, say: Callable[[str], None]
) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {name: [] for name in servers}
    for name in turns(tuple(servers), plan.rounds):
        say(f"{name}: {len(arrivals)} requests in {plan.seconds:g} s")
        found[name] += asyncio.run(open_loop(servers[name], arrivals))
    return found


def _by_class(trace: Trace, alone: Mapping[str, float]) -> dict[str, float]:
    """Mean seconds alone of the kinds of work of each class."""
    seconds: dict[str, list[float]] = {}
    for work, arrival in trace.kinds().items():
        seconds.setdefault(arrival.kind, []).append(alone[work])
    return {kind: statistics.fmean(values) for kind, values in seconds.items()}


def _deadline(arrival: Arrival, limits: Mapping[str, float]) -> float:
    return PATIENCE * limits[work_of(arrival.body)] if arrival.deadline is None else arrival.deadline


def _rows(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    """Rows a forward in between; None when there was none, as where diffusers draws."""
    forwards = after[0] - before[0]
    return (after[1] - before[1]) / forwards if forwards else None


def _statuses(answers: Sequence[Answer]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(Counter(one.status for one in answers).items())}
