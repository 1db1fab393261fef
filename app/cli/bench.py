"""`instep bench step | image | serve`: measurements as tables, and as one line of JSON at the end.

Knows nothing of how anything is measured (app/bench).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cards.card import Card, Size, parse_size
from app.cli import bench_serve
from app.cli.serve import Folder, read_settings
from app.errors import InvalidValue
from app.jobs.body import describe_sizes

if TYPE_CHECKING:
    from app.bench.machine import Ceilings
    from app.bench.subject import Subject
    from app.bench.timing import Spread

app = typer.Typer(help="Measure this machine: a step, an image, a server under load.", no_args_is_help=True)
app.command()(bench_serve.serve)

Model = Annotated[str | None, typer.Option(help="A model id or alias")]
SizeText = Annotated[str | None, typer.Option(help="WxH in pixels")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each, in turns, after two that do not count")]
Random = Annotated[bool, typer.Option("--random-weights", help="The card's networks at true size, without files")]
Json = Annotated[bool, typer.Option("--json", help="The line of JSON alone")]

CEILINGS = "{gflops} GFLOP/s of a matrix product, {gbytes} GB/s of a copy"


@app.command()
def step(
    model: Model = None,
    size: SizeText = None,
    passes: Annotated[str, typer.Option(help="Widths of a step to measure")] = "1,2,4,8,16",
    rounds: Rounds = 10,
    random_weights: Random = False,
    only_json: Json = False,
    models: Folder = None,
) -> None:
    """Milliseconds a step against passes, beside the least that the counted work takes on this machine."""
    widths = _widths(passes)
    settings = read_settings(models=models)
    # NOTE: imported late: torch and the model libraries take seconds.
    from app.bench.machine import ceilings
    from app.bench.step import measure_steps
    from app.bench.subject import loaded

    with loaded(settings, model, random_weights=random_weights) as subject:
        pixels = _size(size, subject.card) if size else subject.card.default_size
        most = ceilings(subject.family.device, subject.family.dtype)
        found = measure_steps(subject.family, pixels, widths, rounds, most)
        facts = _facts(subject, most, rounds, size=f"{pixels[0]}x{pixels[1]}", random_weights=random_weights)
    rows = [
        {
            "passes": one.passes,
            "ms": _ms(one.time),
            "ms_a_pass": round(one.time.median * 1e3 / one.passes, 4),
            "gflop": round(one.work.flops / 1e9, 4),
            "mbytes": round(one.work.bytes / 1e6, 3),
            "floor_ms": round(one.floor * 1e3, 4),
            "share_of_floor": round(one.share, 4),
        }
        for one in found
    ]
    table = _table("passes", "ms a step", "least", "most", "ms a pass", "GFLOP", "floor ms", "share of floor")
    for row in rows:
        times = (f"{value:.2f}" for value in row["ms"].values())  # type: ignore[attr-defined]
        rest = f"{row['ms_a_pass']:.2f}", f"{row['gflop']:.3f}", f"{row['floor_ms']:.2f}"
        table.add_row(str(row["passes"]), *times, *rest, f"{row['share_of_floor']:.0%}")
    _tell({"bench": "step", **facts, "steps": rows}, facts, [table], only_json)


@app.command()
def image(
    model: Model = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less draws without")] = None,
    size: SizeText = None,
    baselines: Annotated[
        str, typer.Option(help="diffusers' pipelines to draw with: eager-, compiled-float32 or -bfloat16; or none")
    ] = "eager-float32,eager-bfloat16",
    rounds: Rounds = 10,
    random_weights: Random = False,
    only_json: Json = False,
    models: Folder = None,
) -> None:
    """One image, stage by stage, and against diffusers' pipelines in the same run, with how far the pictures differ."""
    settings = read_settings(models=models)
    from app.bench.image import asked, measure_image
    from app.bench.machine import ceilings
    from app.bench.subject import loaded

    with loaded(settings, model, random_weights=random_weights) as subject:
        request = asked(subject, steps=steps, guidance=guidance, size=size)
        names = [name.strip() for name in baselines.split(",") if name.strip() not in ("", "none")]
        drawn = measure_image(subject, request, names, rounds)
        most = ceilings(subject.family.device, subject.family.dtype)
        recipe = request.recipe
        facts = _facts(
            subject, most, rounds, size=f"{recipe.width}x{recipe.height}", sampler=recipe.sampler, steps=recipe.steps,
            guidance=recipe.guidance.scale if recipe.guidance.guided else 0.0, random_weights=random_weights,
        )  # fmt: skip
    ways, stages = _table("one image", "ms", "least", "most", "against instep", "mean off", "most off"), _times("stage")
    told = {}
    for name, time in drawn.times.items():
        away, ratio = drawn.distances.get(name), time.median / drawn.times["instep"].median
        off = (f"{away.mean:.3f}", str(away.largest)) if away else ("-", "-")
        ways.add_row(name, *_cells(time), f"{ratio:.2f}x", *off)
        told[name] = {"ms": _ms(time), "against_instep": round(ratio, 4), "off": away._asdict() if away else None}
    for name, time in drawn.stages.items():
        stages.add_row(name, *_cells(time))
    line = {"ways": told, "stages": {name: _ms(time) for name, time in drawn.stages.items()}}
    _tell({"bench": "image", **facts, **line}, facts, [stages, ways], only_json)


def _facts(subject: Subject, most: Ceilings, rounds: int, **more: Any) -> dict[str, Any]:
    """What a number says nothing without."""
    from app.bench.machine import facts

    own = facts(subject.family.device, subject.family.dtype)
    rates = {"gflops": round(most.flops / 1e9, 1), "gbytes": round(most.bytes / 1e9, 2)}
    compiled = {"compiled": subject.settings.compile}
    return {"model": subject.card.id, **more, **own, **compiled, "rounds": rounds, "ceilings": rates}


def _tell(line: dict[str, Any], facts: dict[str, Any], tables: Sequence[Table], only_json: bool) -> None:
    """The card, and one line of JSON last."""
    if not only_json:
        console = Console() if Console().is_terminal else Console(width=160)
        head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in facts.items():
            head.add_row(name.replace("_", " "), CEILINGS.format(**value) if name == "ceilings" else str(value))
        for one in (head, *tables):
            console.print(one)
            console.print()
    print(json.dumps(line))


def _table(*columns: str) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place or column == "passes" else "left")
    return made


def _times(what: str) -> Table:
    return _table(what, "ms", "least", "most")


def _cells(time: Spread) -> list[str]:
    return [f"{value:.2f}" for value in _ms(time).values()]


def _ms(time: Spread) -> dict[str, float]:
    return {name: round(getattr(time, name) * 1e3, 4) for name in ("median", "least", "most")}


def _size(text: str, card: Card) -> Size:
    """Raises InvalidValue: no size, or not one of the card's."""
    try:
        width, height = parse_size(text)
    except ValueError as error:
        raise InvalidValue(f"size: {error}", param="size") from error
    sizes = card.limits.sizes
    if not all(sizes.min <= side <= sizes.max and side % sizes.multiple == 0 for side in (width, height)):
        raise InvalidValue(f"size: {describe_sizes(sizes)}", param="size")
    return width, height


def _widths(text: str) -> list[int]:
    """Raises InvalidValue: not numbers from 1 up."""
    words = [word.strip() for word in text.split(",")]
    found = sorted({int(word) for word in words if word.isdecimal() and len(word) < 5})
    if not all(word.isdecimal() and len(word) < 5 for word in words) or not 1 <= found[0] <= found[-1] <= 1024:
        raise InvalidValue(f'passes: "{text}" is not numbers from 1 to 1024, like "1,2,4"', param="passes")
    return found
