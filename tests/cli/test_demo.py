"""`instep demo`: its numbers are counted from Ticks, and they show that requests shared forwards."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.cli import demo
from app.cli.options import open_registry
from app.errors import NotDownloaded
from app.jobs.job import Job
from app.report import Progress, Result, Tick, Timings
from app.samplers.table import compile_table
from app.settings import Settings
from tests.parts.commands import Run

SHIPPED = Path(__file__).parent.parent.parent / "models"
LAST = re.compile(r"12 images, (\d+) forwards instead of (\d+); the shortest waited (\d+) steps")


def tick(phase: Any = "denoise", left: int = 1) -> Tick:
    return Tick("m", phase, 1, 1, 0, 1, 0.1, left, 0)


def test_twelve_requests_share_their_forwards(run: Run) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    found = LAST.fullmatch(result.stdout.splitlines()[-1])
    assert found, result.stdout
    shared, alone, _ = map(int, found.groups())
    registry = open_registry(Settings())
    script = [job.request.recipe for _, job in demo.write_script(registry)]
    tables = [compile_table(registry.cards[one.model].schedule, one.sampler, one.steps) for one in script]
    assert alone == sum(table.lines for table in tables)
    assert max(table.lines for table in tables) <= shared < alone


def test_the_script_is_mixed(tiny: Path) -> None:
    script = demo.write_script(open_registry(Settings(models=tiny, default_model="tiny-sd3")))
    requests = [job.request for _, job in script]
    assert len(requests) == 12
    assert {request.recipe.model for request in requests} == {"tiny-sd3", "tiny-sd3-turbo", "tiny-dit"}
    assert {request.recipe.guidance.guided for request in requests} == {True, False}
    assert (min(request.recipe.steps for request in requests), max(request.recipe.steps for request in requests)) == (
        1,
        50,
    )
    assert len({request.recipe.sampler for request in requests}) >= 3


def test_the_script_does_with_what_there_is(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-dit").symlink_to(tiny / "tiny-dit")
    script = demo.write_script(open_registry(Settings(models=tmp_path)))
    assert {job.request.recipe.model for _, job in script} == {"tiny-dit"} and len(script) == 12


def test_models_that_are_not_here_do_not_play(tiny: Path, tmp_path: Path) -> None:
    """Neither one of the Hub, nor one that takes a part from there; without any that is here there is no demo."""
    models = tmp_path / "models"
    for name in ("tiny-sd3", "tiny-sd3-turbo", "tiny-dit"):
        shutil.copytree(tiny / name, models / name)
    shutil.rmtree(models / "tiny-sd3" / "vae")
    registry = open_registry(Settings(models=models))
    assert {job.request.recipe.model for _, job in demo.write_script(registry)} == {"tiny-dit"}
    shutil.rmtree(models / "tiny-dit" / "transformer")
    with pytest.raises(NotDownloaded, match="models that are here, and none is"):
        demo.write_script(open_registry(Settings(models=models)))


def test_the_demo_of_the_shipped_folder_draws_with_what_comes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    registry = open_registry(Settings(models=SHIPPED))
    played = {job.request.recipe.model for _, job in demo.write_script(registry)}
    assert played == {"emoji-mmdit", "emoji-mmdit-turbo", "emoji-dit"}


def test_waiting_is_counted_in_forwards_since_arrival(tiny: Path) -> None:
    jobs = [job for _, job in demo.write_script(open_registry(Settings(models=tiny)))[:3]]
    submitted: list[str] = []

    class Sink:
        def submit(self, job: Job) -> None:
            submitted.append(job.request.id)

    tally = demo.Tally([(0, jobs[0]), (2, jobs[1]), (90, jobs[2])], local=Sink())  # type: ignore[arg-type]
    tally.let_in()
    assert submitted == ["demo-0"]
    for _ in range(2):
        tally(Progress("demo-0", 0, 1, 9))
        tally(tick())
    tally(tick("decode"))
    assert submitted == ["demo-0", "demo-1"]
    for _ in range(3):
        tally(tick())
    tally(Progress("demo-1", 0, 1, 9))
    assert (tally.forwards, tally.waited) == (5, {"demo-0": 0, "demo-1": 3})
    tally(tick("decode", left=0))
    assert submitted == ["demo-0", "demo-1", "demo-2"], "an idle engine gets the next one early"


def test_the_last_line(tiny: Path) -> None:
    tally = demo.Tally([], forwards=7, waited={"a": 1, "b": 4})
    pixels = np.zeros((2, 2, 3), np.uint8)
    results = [Result(name, 0, 0, pixels, Timings(0, 0, 0, 0, steps, 1.0)) for name, steps in (("a", 9), ("b", 2))]
    assert demo.summary(tally, results) == "2 images, 7 forwards instead of 11; the shortest waited 4 steps"


@pytest.mark.parametrize("sizes", [((4, 6), (8, 8)), ((64, 64), (32, 32))])
def test_the_sheet_takes_the_smallest_size(sizes: tuple[tuple[int, int], ...]) -> None:
    shown = demo.sheet([np.zeros((*size, 3), np.uint8) for size in sizes])
    height, width = (min(size[axis] for size in sizes) for axis in (0, 1))
    assert shown.shape == (height, 2 * width, 3)
