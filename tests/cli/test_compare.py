"""`instep compare` draws the panel that a server would send, says how far it is, and fails in one line."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from app.cli import generate, paint
from app.cli.options import open_registry
from app.errors import EngineError
from app.jobs.compare import parameters_in_words
from app.jobs.job import Job
from app.report import ModelState, Progress, Timings
from app.report import Result as Drawn
from app.settings import Settings
from app.worker.process import Local
from tests.parts.commands import Run, one_line


def boxes(file: str) -> tuple[np.ndarray, int, int, int]:
    """The panel's pixels; left and top of its first picture, and the width of a cell with its gutter.

    A hairline of one grey is around every picture, and nowhere else in such a run.
    """
    sheet = np.asarray(Image.open(file).convert("RGB"))
    line = (sheet == (0xE4, 0xE4, 0xE4)).all(axis=2)
    tops = [int(row) for row in np.nonzero(line.sum(axis=1) > 200)[0]]
    lefts = [int(column) for column in np.nonzero(line.sum(axis=0) > 200)[0]]
    return sheet, lefts[0] + 1, tops[0] + 1, lefts[2] - lefts[0] if len(lefts) > 2 else 0


def test_two_prompts_by_two_models(run: Run) -> None:
    words = ("--prompt", "red", "--prompt", "a blue car", "--steps", 2, "--seed", 5, "--size", "32x32", "-o", "p.png")
    done = run("compare", "tiny-sd3", "tiny-sd3-turbo", *words)
    assert done.exit_code == 0, done.output
    first, told = done.stdout.splitlines()
    assert first.startswith("p.png  seed 5  4 pictures  ")
    assert {"tiny-sd3: 2 pictures", "tiny-sd3-turbo: 2 pictures"} <= set(done.stderr.splitlines())
    body = {"models": ["tiny-sd3", "tiny-sd3-turbo"], "prompt": ["red", "a blue car"], "size": "32x32", "seed": 5}
    body["num_inference_steps"] = 2
    command = shlex.split(told)
    assert command[:2] == ["curl", "localhost:8000/v1/images/compare"] and command[-2:] == ["-o", "p.png"]
    assert json.loads(command[command.index("-d") + 1]) == body == json.loads(Image.open("p.png").text["instep"])
    sheet, left, top, step = boxes("p.png")
    for column, model in enumerate(("tiny-sd3", "tiny-sd3-turbo")):
        alone = run("generate", "red", "--model", model, "--steps", 2, "--seed", 5, "--size", "32x32", "-o", "a.png")
        assert alone.exit_code == 0, alone.output
        twin = Image.open("a.png").resize((256, 256), Image.Resampling.LANCZOS)
        cell = sheet[top : top + 256, left + column * step : left + column * step + 256]
        assert np.abs(cell.astype(int) - np.asarray(twin, int)).max() <= 2


def test_classes_in_order_of_parameters(run: Run, tiny: Path) -> None:
    for name, line in (("small", "parameters = 1_000"), ("large", "parameters = 12_345_678"), ("unknown", "")):
        Path(name).mkdir()
        for part in (*tiny.joinpath("tiny-dit").iterdir(),):
            Path(name, part.name).symlink_to(part)
        Path(name, "card.toml").unlink()
        card = (tiny / "tiny-dit" / "card.toml").read_text().replace("tiny-dit", name)
        Path(name, "card.toml").write_text(card.replace("components", f"{line}\ncomponents", 1))
    words = ("--class-label", "3,7", "--steps", 2, "--seed", 0, "--models", ".", "-o", "c.webp")
    done = run("compare", "unknown", "large", "small", *words)
    assert done.exit_code == 0, done.output
    body = json.loads(shlex.split(done.stdout.splitlines()[1])[7])
    assert body == {"models": ["small", "large", "unknown"], "class_label": [3, 7], "num_inference_steps": 2, "seed": 0}
    assert Image.open("c.webp").format == "WEBP"
    registry = open_registry(Settings(models=Path(".")))
    comparison, jobs = generate.plan({"models": ["large", "unknown", "small"], "class_label": ["red", 3]}, registry)
    assert comparison.models == ["small", "large", "unknown"] == [job.card.id for job in jobs[:3]]
    assert [job.shows for job in jobs[::3]] == ["red", "yellow"]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (None, None),
        (6_540_000, "6.5 M"),
        (675_129_632, "675.1 M"),
        (999_949_999, "999.9 M"),
        (995_000_000, "995.0 M"),
        (999_999_999, "1.00 B"),
        (8_056_627_520, "8.06 B"),
        (11_901_408_320, "11.90 B"),
    ],
)
def test_parameters_as_a_person_says_them(count: int | None, said: str | None) -> None:
    assert parameters_in_words(count) == said


def test_the_preset_takes_every_model_of_prompts_that_is_here(run: Run) -> None:
    comparison, jobs = generate.plan({"preset": "two_prompts"}, open_registry(Settings()))
    assert comparison.models == ["tiny-sd3", "tiny-sd3-no-t5", "tiny-sd3-turbo"]
    assert {(job.request.recipe.steps, job.request.recipe.guidance.scale) for job in jobs} == {(28, 7.0)}
    assert len({job.request.id for job in jobs}) == 6 and all(job.request.delivery.progress for job in jobs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "models: is required"),
        (("tiny-sd3",), "prompt: a comparison has one of prompt"),
        (("tiny-sd", "--prompt", "a"), 'There is no model "tiny-sd"'),
        (("tiny-sd3", "tiny-dit", "--prompt", "a"), "tiny-dit: prompt: this model draws classes"),
        (("tiny-sd3", "--prompt", "a", "--steps", 101), "tiny-sd3: num_inference_steps: expects 1 to 100"),
        (("tiny-dit", "--class-label", "gren"), "tiny-dit: class_label: tiny-dit has no such class; did you mean"),
        (("tiny-sd3", "--preset", "three"), "preset: expects one of two_prompts"),
        (("tiny-sd3", "--prompt", "a", "-o", "a.gif"), "a.gif: the name must end in .png"),
    ],
)
def test_a_bad_comparison_is_one_line(run: Run, words: tuple[object, ...], said: str) -> None:
    assert said in one_line(run("compare", *words))
    assert list(Path.cwd().iterdir()) == []


def test_an_error_of_the_engine_names_the_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(local: Local, job: Job) -> None:
        if job.request.recipe.model == "tiny-sd3-turbo":
            job.fail(EngineError("the network gave NaN", code="non_finite_output"))

    monkeypatch.setattr(Local, "submit", fail)
    said = one_line(run("compare", "tiny-sd3", "tiny-sd3-turbo", "--prompt", "red"))
    assert said == "tiny-sd3-turbo: the network gave NaN" and list(Path.cwd().iterdir()) == []


def test_a_terminal_sees_a_bar_for_each_model(run: Run) -> None:
    _, jobs = generate.plan({"models": ["tiny-sd3", "tiny-sd3-turbo"], "prompt": "a"}, open_registry(Settings()))
    pixels, timings = np.zeros((16, 32, 3), np.uint8), Timings(0.0, 0.1, 0.2, 0.3, 4, 1.0)
    first, second = jobs
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with generate.bars(jobs, console):
        paint.tell_loading(console, ModelState("tiny-sd3", "loading"))
        second.hear(Progress("compare-1", 0, 3, 4))
        for job in (second, first):
            job.hear(Drawn(job.request.id, 0, 1, pixels, timings))
    assert [result.request_id for (result,) in paint.results(jobs)] == ["compare-0", "compare-1"]
    assert "loading tiny-sd3 ..." in screen.getvalue() and "1/4" in screen.getvalue()
    assert "tiny-sd3-turbo: 1 picture" in screen.getvalue()
