"""`instep bench serve`: policies side by side under load, as tables and one JSON line; or a trace recorded to a file.

Knows nothing of how requests are sent or of what a policy does.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.bench.trace import Trace
from app.cards.card import Card
from app.cli.bodies import open_registry
from app.cli.serve import Folder, read_settings
from app.errors import InvalidValue
from app.settings import Settings

MIXES = ("mixed", "homogeneous")


def serve(
    model: Annotated[str | None, typer.Option(help="A model id or alias")] = None,
    models: Folder = None,
    trace: Annotated[Path | None, typer.Option(help="A recorded trace; without one, --mix is drawn anew")] = None,
    policies: Annotated[
        str, typer.Option(help="continuous, static, single, diffusers, diffusers-bf16")
    ] = "continuous,static",
    baseline: Annotated[str | None, typer.Option(help="What the others are compared with; the last policy")] = None,
    at_capacity: Annotated[float, typer.Option(min=0.01, help="Mean rate, in multiples of the baseline's")] = 0.9,
    queued: Annotated[int, typer.Option(min=1, help="Requests of the closed loop that measures capacity")] = 200,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of arrivals: of each round, or of what is recorded")] = 60.0,
    rounds: Annotated[int, typer.Option(min=1, help="For each policy, in the order A B B A")] = 2,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32 (INSTEP_DTYPE)")] = None,
    random_weights: Annotated[bool, typer.Option(help="The card's networks with random weights, at true size")] = False,
    record: Annotated[Path | None, typer.Option(help="Only write a trace to this file")] = None,
    mix: Annotated[str, typer.Option(help="What is drawn: mixed (13 kinds of work) or homogeneous (one)")] = "mixed",
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests a second of what is drawn")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn")] = 0,
) -> None:
    """Measure serving under load: a closed loop for capacity, then one open-loop trace for latency."""
    from app.bench import trace as traces

    settings = read_settings(models=models, dtype=dtype)
    if mix not in MIXES:
        raise InvalidValue(f"mix: {mix}: there are {', '.join(MIXES)}", param="mix")
    card = open_registry(settings).find(model)
    if record and trace:
        raise InvalidValue("record: a trace that is read is recorded already", param="record")
    drawn = traces.read(trace) if trace else traces.record(card, mix, rate, seconds, seed)  # type: ignore[arg-type]
    if record:
        traces.write(drawn, record)
        Console().print(f"{record}: {len(drawn.arrivals)} requests in {seconds:g} s", highlight=False, markup=False)
    else:
        names = tuple(dict.fromkeys(name.strip() for name in policies.split(",") if name.strip()))
        if not names:
            raise InvalidValue("policies: none is given", param="policies")
        plan = (names, baseline or names[-1], at_capacity, queued, seconds, rounds)
        _compare(settings, card, drawn, plan, random_weights)


def _compare(settings: Settings, card: Card, trace: Trace, plan: tuple[Any, ...], random_weights: bool) -> None:
    from app.bench.serve import Plan

    checked = Plan(*plan)
    checked.check()
    with tempfile.TemporaryDirectory(prefix="instep-bench-") as folder:
        if random_weights:
            settings = _random(settings, card, Path(folder))
        found = {"random_weights": random_weights, **_measure(settings, card, trace, checked)}
    show(Console(), found)
    print(json.dumps(found))


def _random(settings: Settings, card: Card, folder: Path) -> Settings:
    """Settings whose models are the one of this card, made of random weights."""
    from app.bench.weights import write_random
    from app.worker import plan
    from app.worker.process import resolve_dtype

    dtype = resolve_dtype(settings, plan.devices(settings.devices)[0])
    write_random(card, open_registry(settings).cards, folder, dtype)
    return settings.model_copy(update={"models": folder})


def _measure(settings: Settings, card: Card, trace: Trace, plan: Any) -> dict[str, Any]:
    import torch

    from app.bench.machine import facts
    from app.bench.serve import compare
    from app.worker import plan as placing
    from app.worker.process import resolve_dtype

    device = placing.devices(settings.devices)[0]
    told = facts(torch.device(device), resolve_dtype(settings, device))
    told |= {"threads": placing.threads(settings), "compiled": settings.compile}
    errors = Console(stderr=True)
    bodies = tuple(one._replace(body={**one.body, "model": card.id}) for one in trace.arrivals)
    found = compare(
        settings, card.id, Trace(trace.facts, bodies), plan, lambda line: errors.print(line, highlight=False)
    )
    return {"bench": "serve", **told, "model": card.id, **found}


def show(console: Console, found: dict[str, Any]) -> None:
    """A table for each policy."""
    for name, one in found["policies"].items():
        capacity, own = one["capacity"], found["ratios"].get(name)
        title = f"{name}: {capacity['median']:.2f} images/s ({capacity['least']:.2f} to {capacity['most']:.2f})"
        title += f", {own['capacity']:.2f}x of {found['baseline']}" if own else ""
        table = Table(title=title, title_justify="left", box=None)
        for column in ("seconds", "n", "alone", "p50", "p95", "p99", "mean", "in time", "p50 x", "p95 x"):
            table.add_column(column, justify="left" if column == "seconds" else "right")
        for kind, row in one["latency"].items():
            seconds = [f"{row[what]:.2f}" for what in ("p50", "p95", "p99", "mean")]
            alone = f"{one['alone'][kind]:.2f}" if kind in one["alone"] else ""
            better = [f"{own[kind][what]:.2f}x" for what in ("p50", "p95")] if own else ["", ""]
            table.add_row(kind, str(row["count"]), alone, *seconds, f"{row['attainment']:.0%}", *better)
        console.print(table)
        shared = f"{one['rows']:.2f} rows a forward; " if one["rows"] else ""
        late = f"the client at most {1e3 * one['client_late']:.0f} ms late"
        console.print(f"{shared}answers by status: {one['statuses']}; {late}", highlight=False)
    load = f"{found['rate']:.2f} requests/s, {found['load']:g} of {found['baseline']}'s capacity"
    console.print(f"{found['model']}, {load}, {found['rounds']} rounds of {found['seconds']:g} s", highlight=False)
