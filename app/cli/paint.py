"""What a terminal shows while pictures are drawn, and of them: lines, bars, half-block cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.style import Style
from rich.text import Text

from app.cards.card import Card
from app.jobs.job import Job
from app.report import ModelState, Preview, Report, Result
from app.report import Progress as Step
from app.settings import Settings
from app.worker.process import Local


def say(console: Console, line: str) -> None:
    """Print a line as it is: not wrapped, not coloured, no markup read into it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def bars_of(console: Console) -> Progress:
    """Bars that vanish when all is drawn, and that only a terminal sees."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class Watch:
    """Shows how far jobs are, and waits for them.

    name: of the bar of one image, which those of the same name share; with `ahead` the bars are seen before the first
    step. loads: whether a line says that a model loads.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        name: Callable[[Job, int], str],
        bars: Progress,
        *,
        ahead: bool = True,
        loads: bool = True,
    ) -> None:
        self.bars, self._jobs, self._name, self._loads = bars, jobs, name, loads
        self._tasks: dict[str, TaskID] = {}
        images = [(job, name(job, index)) for job in jobs for index in range(len(job.request.images))]
        self._images = Counter(one for _, one in images)
        for job, one in images:
            job.on_report = partial(self._hear, job)
            if one not in self._tasks:
                total = self._images[one] * job.request.recipe.steps
                self._tasks[one] = bars.add_task(one, total=total, visible=ahead)

    def draw(self, settings: Settings, cards: dict[str, Card]) -> list[list[Result]]:
        """The results of each job, by an engine in this process. Raises the error of the first that fails."""
        with Local(settings, cards, observe=self.observe) as engine, self.bars:
            for job in self._jobs:
                engine.submit(job)
            return self.results()

    def observe(self, report: Report) -> None:
        """Print a line when a model begins to load and when it is ready."""
        if self._loads and isinstance(report, ModelState) and not report.rates:
            if report.state == "loading":
                say(self.bars.console, f"loading {report.model} ...")
            elif report.state == "ready":
                say(self.bars.console, f"{report.model} ready in {report.seconds:.1f} s")

    def results(self) -> list[list[Result]]:
        """The results of each job, once all are there. Raises the error of one as soon as it fails."""
        wait([job.future for job in self._jobs], return_when=FIRST_EXCEPTION)
        for job in self._jobs:
            if job.error:
                raise job.error
        return [job.result() for job in self._jobs]

    def _hear(self, job: Job, report: Preview | Step | Result) -> None:
        if isinstance(report, Step):
            name = self._name(job, report.index)
            self.bars.update(self._tasks[name], advance=1, total=self._images[name] * report.steps, visible=True)


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
        cells = (("▀", _style(above, below)) for above, below in zip(upper.tolist(), lower.tolist(), strict=True))
        lines.append(Text.assemble(*cells, no_wrap=True))
    return Text("\n").join(lines)


def shrink(pixels: np.ndarray, across: int, down: int) -> np.ndarray:
    """Box-averaged uint8 [height, width, 3] -> uint8 [down, across, 3], for down <= height and across <= width."""
    height, width, _ = pixels.shape
    rows, columns = np.arange(down) * height // down, np.arange(across) * width // across
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float64), rows, axis=0), columns, axis=1)
    areas = np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)[None]
    mean: np.ndarray = np.rint(sums / areas[:, :, None]).astype(np.uint8)
    return mean


def _style(above: list[int], below: list[int]) -> Style:
    return Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
