"""What a terminal shows: lines, tables, bars while pictures are drawn, and pictures in half-block cells."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial
from typing import Any

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from app.cards.card import Card
from app.jobs.job import Job
from app.report import ModelState, Report, Result
from app.report import Progress as Step
from app.settings import Settings
from app.worker.process import Local


def say(console: Console, line: str) -> None:
    """Print a line as it is: not wrapped, not coloured, no markup read into it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def bars_of(console: Console, jobs: Sequence[Job], name: Callable[[Job, int], str]) -> Progress:
    """Bars of these jobs (see `follow`) that vanish when all is drawn, and that only a terminal sees."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    follow(jobs, name, bars)
    return bars


def follow(jobs: Sequence[Job], name: Callable[[Job, int], str], bars: Progress) -> None:
    """Show the steps of jobs in bars. name: of the bar of one image of a job; images with the same name share one."""
    names = [(job, name(job, index)) for job in jobs for index in range(len(job.request.images))]
    images = Counter(one for _, one in names)
    totals = {one: images[one] * job.request.recipe.steps for job, one in names}
    tasks = {one: bars.add_task(one, total=total) for one, total in totals.items()}

    def hear(job: Job, report: object) -> None:
        if isinstance(report, Step):
            one = name(job, report.index)
            bars.update(tasks[one], advance=1, total=images[one] * report.steps)

    for job in jobs:
        job.on_report = partial(hear, job)


def tell_loading(console: Console, report: Report) -> None:
    """Print a line in a terminal when a model begins to load and when it is ready."""
    if console.is_terminal and isinstance(report, ModelState) and not report.rates:
        if report.state == "loading":
            say(console, f"loading {report.model} ...")
        elif report.state == "ready":
            say(console, f"{report.model} ready in {report.seconds:.1f} s")


def draw(jobs: Sequence[Job], settings: Settings, cards: dict[str, Card], bars: Progress) -> list[list[Result]]:
    """The results of each job, by an engine in this process. Raises the error of the first that fails."""
    with Local(settings, cards, observe=partial(tell_loading, bars.console)) as engine, bars:
        for job in jobs:
            engine.submit(job)
        return results(jobs)


def results(jobs: Sequence[Job]) -> list[list[Result]]:
    """Wait for the results of each job. Raises the error of one as soon as it fails."""
    wait([job.future for job in jobs], return_when=FIRST_EXCEPTION)
    for job in jobs:
        if job.error:
            raise job.error
    return [job.result() for job in jobs]


def table(rows: Sequence[Mapping[str, str]], left: Collection[str] = (), **looks: Any) -> Table:
    """A table without lines: rows by the heads of their columns. left: columns of words; amounts stand at the right."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", **looks)
    for head in rows[0] if rows else ():
        made.add_column(head, overflow="fold", justify="left" if head in left else "right")
    for row in rows:
        made.add_row(*map(escape, row.values()))
    return made


def facts_table(facts: Mapping[str, object]) -> Table:
    return table([{"": name, " ": str(value)} for name, value in facts.items()], ("", " "), show_header=False)


def show_tables(*tables: Table) -> None:
    """Print tables, as wide as they need when the output is not a terminal, so that it can be searched."""
    console = Console() if Console().is_terminal else Console(width=1000)
    for number, one in enumerate(tables):
        console.print(*([""] if number else []), one, sep="\n", highlight=False)


def half_blocks(pixels: np.ndarray, columns: int) -> Text:
    """uint8 [height, width, 3] as lines of at most `columns` characters; each cell shows two pixels, upper and lower.

    Larger pictures are averaged down, smaller ones are not enlarged.
    """
    height, width, _ = pixels.shape
    across = max(1, min(columns, width))
    down = max(2, round(height * across / width / 2) * 2) if height > 1 else 1
    small = shrink(pixels, across, min(down, height))
    if len(small) % 2:
        small = np.concatenate([small, small[-1:]])
    lines = []
    for upper, lower in zip(small[0::2], small[1::2], strict=True):
        pairs = zip(upper.tolist(), lower.tolist(), strict=True)
        styles = (Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)) for above, below in pairs)
        lines.append(Text.assemble(*(("▀", style) for style in styles), no_wrap=True))
    return Text("\n").join(lines)


def shrink(pixels: np.ndarray, across: int, down: int) -> np.ndarray:
    """Box-averaged uint8 [height, width, 3] -> uint8 [down, across, 3], for down <= height and across <= width."""
    height, width, _ = pixels.shape
    rows, columns = np.arange(down) * height // down, np.arange(across) * width // across
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float64), rows, axis=0), columns, axis=1)
    areas = np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)[None]
    mean: np.ndarray = np.rint(sums / areas[:, :, None]).astype(np.uint8)
    return mean
