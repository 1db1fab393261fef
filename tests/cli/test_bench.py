"""`instep bench` on tiny models: what it prints that does not depend on time, what it refuses, and recorded traces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.bench import machine
from tests.parts.commands import Run, one_line


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of small matrices, which are measured in no time."""
    monkeypatch.setattr(machine, "MATMULS", {"cpu": (64,)})
    monkeypatch.setattr(machine, "COPIED", {"cpu": 1 << 20})


def last(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    line: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return line


def test_step_tells_times_work_and_floor(run: Run) -> None:
    result = run("bench", "step", "--model", "tiny-sd3", "--passes", "4,1", "--rounds", 2, "--size", "32x16")
    line = last(result)
    assert (line["bench"], line["model"], line["size"], line["rounds"]) == ("step", "tiny-sd3", "32x16", 2)
    one, four = line["steps"]
    assert (one["passes"], four["passes"]) == (1, 4) and four["gflop"] == pytest.approx(4 * one["gflop"], rel=0.02)
    for row in line["steps"]:
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"]["median"], abs=0.01)
    assert "share of floor" in result.stdout and "matmul gflops" in result.stdout


def test_step_with_random_weights_needs_no_files(run: Run) -> None:
    result = run("bench", "step", "--model", "tiny-dit", "--passes", "1", "--rounds", 1, "--random-weights", "--json")
    assert last(result)["random_weights"] is True and len(result.stdout.splitlines()) == 1


def test_image_tells_every_stage(run: Run) -> None:
    result = run("bench", "image", "--model", "tiny-sd3", "--steps", 3, "--rounds", 1)
    line = last(result)
    assert list(line["ways"]) == ["instep", "instep-cached"] and line["ways"]["instep"]["ms"]["median"] > 0
    assert set(line["stages"]) == {
        *("encode text, fresh", "encode text, cached", "denoise", "denoise, a step", "decode"),
        "encode PNG",
    }
    assert (line["sampler"], line["num_inference_steps"]) == ("flow_euler", 3) and "instep-cached" in result.stdout


def test_image_of_classes_alone(run: Run) -> None:
    line = last(run("bench", "image", "--model", "tiny-dit", "--steps", 2, "--rounds", 1))
    assert list(line["ways"]) == ["instep", "instep-cached"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("step", "--passes", "1,x"), 'passes: "1,x" is not numbers'),
        (("step", "--passes", "1,99999"), 'passes: "1,99999" is not numbers'),
        (("step", "--size", "33x32"), "size: "),
        (("step", "--model", "nobody"), 'There is no model "nobody"'),
        (("step", "--rounds", "0"), "--rounds"),
        (("image", "--steps", "0"), "num_inference_steps"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Run, words: tuple[str, ...], told: str) -> None:
    given = words if "--model" in words else (*words, "--model", "tiny-sd3")
    assert told in one_line(run("bench", *given))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--mix", "odd"), "'odd' is not one of 'mixed', 'homogeneous'"),
        (("--at-capacity", "inf"), "should be less than or equal to"),
        (("--seconds", "inf"), "should be less than or equal to"),
        (("--model", "nobody"), "nobody"),
    ],
)
def test_a_load_that_makes_no_sense_is_one_line(run: Run, words: tuple[str, ...], told: str) -> None:
    assert told in one_line(run("bench", "serve", *words))
