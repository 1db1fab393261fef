"""Instep beside other systems, in the same run: `python -m tests.bench.compare serve | image ...`.

    serve   policies side by side under load, each behind the same front: --policies continuous,static,single,
            diffusers,diffusers-bf16 (`tests/bench/policies.py`). All servers are up, one works.
    image   one image by Instep and by diffusers' pipelines, with how far the pictures differ: --baselines
            eager-float32,eager-bfloat16,compiled,compiled-float32,compiled-bfloat16, or none

The other options are those of `instep bench serve` and `instep bench image`: --model, --models, --trace, --at-capacity,
--queued, --seconds, --rounds, --random-weights; --steps, --guidance, --size. Both end in one JSON line.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from app.bench import serve as load
from app.bench.engine import Draw, ask, measure_image
from app.bench.machine import facts, milliseconds, turns
from app.bench.subject import chosen, loaded
from app.cli.bench import (
    TIMES,
    AtCapacity,
    Dtype,
    Loops,
    MixName,
    Queued,
    Random,
    Rounds,
    Seconds,
    Seed,
    formed,
    load_table,
    show,
    times_table,
)
from app.cli.options import Folder, Model, body_flags, open_registry, read_settings, with_flags
from app.errors import InvalidValue
from app.families.base import Family
from app.families.compiling import allow_compiling
from app.jobs.body import ImageBody
from app.jobs.facts import recipe_facts
from app.request import Request
from app.settings import Settings
from tests.bench import recorded
from tests.bench.policies import POLICIES
from tests.bench.recorded import Trace
from tests.bench.upstream import Upstream
from tests.parts.servers import Served

app = typer.Typer(help=__doc__, no_args_is_help=True)
say = Console(stderr=True, highlight=False).print
REFERENCE = "eager-float32"
BASELINES: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": torch.float32},
    "eager-bfloat16": {"dtype": torch.bfloat16},
    "compiled": {"compiled": True},
    "compiled-float32": {"dtype": torch.float32, "compiled": True},
    "compiled-bfloat16": {"dtype": torch.bfloat16, "compiled": True},
}
"""diffusers' pipelines by name; "compiled" is in the number format that Instep runs in."""


class Plan(NamedTuple):
    """What is compared. share: of the baseline's capacity, at which the trace is replayed for `seconds`.

    queued: requests of the closed loop. rounds: of both loops for each policy, in the order A B B A.
    """

    policies: tuple[str, ...] = ("continuous", "static")
    baseline: str = "static"
    share: float = 0.9
    queued: int = 200
    seconds: float = 60.0
    rounds: int = 2

    def check(self) -> None:
        """Raises InvalidValue on a policy that is not known, or a baseline that is not among those that run."""
        for name in self.policies:
            if name not in POLICIES:
                raise InvalidValue(f"policies: {name}: there are {', '.join(POLICIES)}", param="policies")
        if self.baseline not in self.policies:
            known = ", ".join(self.policies) or "none"
            raise InvalidValue(f"baseline: {self.baseline} is not among the policies: {known}", param="baseline")


@app.command()
def serve(
    model: Model = None,
    models: Folder = None,
    trace: Annotated[Path | None, typer.Option(help="A recorded trace; without one, --mix is drawn anew")] = None,
    policies: Annotated[str, typer.Option(help=", ".join(POLICIES))] = "continuous,static",
    baseline: Annotated[str | None, typer.Option(help="What the others are compared with; the last policy")] = None,
    at_capacity: AtCapacity = 0.9,
    queued: Queued = 200,
    seconds: Seconds = 60.0,
    rounds: Loops = 2,
    dtype: Dtype = None,
    random_weights: Random = False,
    record: Annotated[Path | None, typer.Option(help="Only write a trace to this file")] = None,
    mix: MixName = "mixed",
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests a second of what is drawn")] = 4.0,
    seed: Seed = 0,
) -> None:
    """Policies side by side under load."""
    settings = read_settings(models=models, dtype=dtype)
    names = tuple(dict.fromkeys(name.strip() for name in policies.split(",") if name.strip()))
    if not names:
        raise InvalidValue("policies: none is given", param="policies")
    plan = Plan(names, baseline or names[-1], at_capacity, queued, seconds, rounds)
    plan.check()
    card = open_registry(settings).find(model)
    drawn = recorded.read(trace) if trace else recorded.record(card, mix, rate, seconds, seed)
    if record:
        return drawn.write(record)
    with chosen(settings, model, random_weights=random_weights) as (settings, card):
        found = compare(settings, card.id, drawn.of(card.id), plan)
    line = {"bench": "serve", "model": card.id, "random_weights": random_weights, **facts(settings), **found}
    show(line, *(load_table(name, one) for name, one in found["policies"].items()), ratios_table(found))


def compare(settings: Settings, model: str, trace: Trace, plan: Plan) -> dict[str, Any]:
    """Every policy's capacity and latencies, and their ratios to the baseline's, as plain data.

    Raises InvalidValue, and EngineError when a server does not answer a request that it gets alone.
    """
    with ExitStack() as stack:
        loads = {}
        for name in plan.policies:
            say(f"{name}: starting")
            loads[name] = load.Load(name, stack.enter_context(serving(name, settings, model)), trace.kinds())
        for name in turns(plan.policies, load.SAMPLES):
            loads[name].time_alone()
        for name in turns(plan.policies, plan.rounds):
            say(f"{name}: {plan.queued} queued, {loads[name].fill(trace.first(plan.queued)):.2f} images/s")
        rate = plan.share * statistics.median(loads[plan.baseline].rates)
        arrivals = trace.at_rate(rate, plan.seconds)
        for name in turns(plan.policies, plan.rounds):
            say(f"{name}: {len(arrivals)} requests in {plan.seconds:g} s")
            loads[name].replay(arrivals)
        limits = loads[plan.baseline].alone
        found = {name: one.facts(limits) for name, one in loads.items()}
    loop = {"trace": trace.facts, "baseline": plan.baseline, "load": plan.share, "rate": rate, "queued": plan.queued}
    times = {"seconds": plan.seconds, "rounds": plan.rounds, "requests": len(arrivals)}
    return {**loop, **times, "policies": found, "ratios": ratios(found, plan.baseline)}


@contextmanager
def serving(policy: str, settings: Settings, model: str) -> Iterator[str]:
    """A server under this policy, once the model is loaded; its URL."""
    command = (sys.executable, "-m", "tests.bench.policies", policy)
    with Served(load.for_load(settings, model), command) as server:
        server.wait_ready(load.START)
        yield server.url
        server.stop()


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


def ratios_table(found: Mapping[str, Any]) -> Table:
    """How many times better than the baseline the others are, by class."""
    columns = {f"times better than {found['baseline']}": "{name}", "capacity": "{capacity:.2f}x", "class": "{kind}"}
    rows = [
        {"name": name, "capacity": own["capacity"], "kind": kind, **own[kind]}
        for name, own in found["ratios"].items()
        for kind in found["policies"][name]["latency"]
    ]
    return formed({**columns, "p50": "{p50:.2f}x", "p95": "{p95:.2f}x"}, rows)


@app.command()
@with_flags(body_flags(ImageBody))
def image(
    baselines: Annotated[str, typer.Option(help=f"{', '.join(BASELINES)}; or none")] = "eager-float32,eager-bfloat16",
    rounds: Rounds = 10,
    random_weights: Random = False,
    models: Folder = None,
    **fields: Any,
) -> None:
    """One image beside diffusers' pipelines."""
    names = [name.strip() for name in baselines.split(",") if name.strip() not in ("", "none")]
    settings = read_settings(models=models)
    with loaded(settings, fields["model"], random_weights=random_weights) as (pool, family):
        request = ask(family.card, **fields)
        others = pipelines(settings, family, request, names)
        times, stages, pictures = measure_image(pool, settings, request, rounds, others)
    reference, told, rows = pictures.get(REFERENCE), {}, []
    for name, samples in times.items():
        away = distance(pictures[name], reference) if reference is not None else None
        ratio = statistics.median(samples) / statistics.median(times["instep"])
        told[name] = {
            "ms": milliseconds(samples), "against_instep": round(ratio, 4), "off": away._asdict() if away else None
        }  # fmt: skip
        off = {"mean": f"{away.mean:.3f}", "largest": away.largest} if away else {"mean": "-", "largest": "-"}
        rows.append({"name": name, **told[name], **off})
    found = {name: milliseconds(samples) for name, samples in stages.items()}
    columns = {"against instep": "{against_instep:.2f}x", "mean off": "{mean}", "most off": "{largest}"}
    line = {"bench": "image", **recipe_facts(request.recipe), **facts(settings), "random_weights": random_weights}
    line |= {"rounds": rounds, "ways": told, "stages": found}
    show(line, times_table("stage", found), formed({"one image": "{name}", **TIMES, **columns}, rows))


class Distance(NamedTuple):
    """Between two pictures, in levels of 0..255: the mean and the largest absolute difference."""

    mean: float
    largest: int


def distance(picture: np.ndarray, reference: np.ndarray) -> Distance:
    """Of two uint8 pictures of one size."""
    away = np.abs(picture.astype(np.int16) - reference)
    return Distance(float(away.mean()), int(away.max()))


def pipelines(settings: Settings, family: Family, request: Request, names: Sequence[str]) -> dict[str, Draw]:
    """diffusers' pipelines that draw this request. Raises InvalidValue: no such baseline, or none for this request."""
    return {name: _pipeline(settings, family, request, name) for name in names}


def _pipeline(settings: Settings, family: Family, request: Request, name: str) -> Callable[[], np.ndarray]:
    if name not in BASELINES:
        raise InvalidValue(f'baselines: there is no "{name}"; there are {", ".join(BASELINES)}', param="baselines")
    if BASELINES[name].get("compiled"):
        allow_compiling(settings.cache)
    upstream = Upstream(family, **BASELINES[name])
    return lambda: upstream.draw(request)


if __name__ == "__main__":
    app()
