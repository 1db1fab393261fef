"""Comparisons with other systems, end to end: real servers, a tiny model, every request answered, one JSON line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from app.bench import machine
from app.errors import InvalidValue
from tests.bench.compare import Plan, app, ratios
from tests.parts.commands import Run


def test_ratios_are_above_one_where_a_policy_is_better() -> None:
    def one(capacity: float, seconds: float) -> dict[str, object]:
        return {
            "capacity": {"median": capacity},
            "latency": {"all": dict.fromkeys(("p50", "p95", "p99", "mean"), seconds)},
            "statuses": {"200": 9},
        }

    found = ratios({"a": one(4, 1), "b": one(2, 3)}, "b")
    assert found == {"a": {"capacity": 2.0, "all": dict.fromkeys(("p50", "p95", "p99", "mean"), 3.0)}}


def test_who_lost_a_request_has_no_ratios() -> None:
    whole = {
        "capacity": {"median": 1.0},
        "latency": {"all": dict.fromkeys(("p50", "p95", "p99", "mean"), 1.0)},
        "statuses": {"200": 9},
    }
    broken = whole | {"statuses": {"200": 8, "503": 1}}
    assert set(ratios({"a": whole, "b": broken, "c": whole}, "a")) == {"c"}
    assert ratios({"a": whole, "b": broken}, "b") == {}


@pytest.mark.parametrize("plan", [Plan(policies=("none",), baseline="none"), Plan(baseline="single")])
def test_a_plan_that_makes_no_sense_is_refused(plan: Plan) -> None:
    with pytest.raises(InvalidValue):
        plan.check()


@pytest.fixture
def compare(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`compare("image", ...)` on the tiny models, with ceilings that are measured in no time."""
    monkeypatch.setattr(machine, "MATMULS", {"cpu": (64,)})
    monkeypatch.setattr(machine, "COPIED", {"cpu": 1 << 20})
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def last(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, (result.output, result.exception)
    line: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return line


@pytest.mark.slow
def test_every_request_is_answered_under_every_policy(compare: Run) -> None:
    words = ("--model", "tiny-sd3", "--mix", "homogeneous", "--policies", "continuous,static")
    found = last(compare("serve", *words, "--queued", 4, "--rounds", 1, "--seconds", 3))
    assert found["bench"] == "serve" and set(found["policies"]) == {"continuous", "static"}
    for one in found["policies"].values():
        assert one["statuses"] == {"200": 4 + found["requests"]}
        assert one["latency"]["all"]["count"] == found["requests"] and one["capacity"]["median"] > 0
        forwards = 20 * (4 + found["requests"]) / one["rows"]
        assert forwards == pytest.approx(round(forwards)) and one["rows"] >= 1, "the 20 steps of these, and no others"
    assert set(found["ratios"]) == {"continuous"} and found["commit"] is not None


def test_image_is_the_baselines_picture(compare: Run) -> None:
    """Instep's picture, encoded anew or not, is diffusers' float32 one within rounding; stages are all there."""
    words = ("--steps", 3, "--rounds", 1, "--baselines", "eager-float32,eager-bfloat16")
    line = last(compare("image", "--model", "tiny-sd3", *words))
    assert list(line["ways"]) == ["instep", "instep-cached", "eager-float32", "eager-bfloat16"]
    assert line["ways"]["eager-float32"]["off"] == {"mean": 0.0, "largest": 0}
    for name in ("instep", "instep-cached"):
        assert line["ways"][name]["off"]["largest"] <= 1
    assert line["ways"]["eager-bfloat16"]["off"]["mean"] > 0
    assert line["ways"]["instep"]["against_instep"] == 1.0
    assert set(line["stages"]) == {
        *("encode text, fresh", "encode text, cached", "denoise", "denoise, a step", "decode"),
        "encode PNG",
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("serve", "--policies", ""), "policies: none is given"),
        (("serve", "--policies", "continuous,fast"), "policies: fast"),
        (
            ("serve", "--policies", "continuous", "--baseline", "static"),
            "baseline: static is not among the policies: continuous",
        ),
        (("image", "--baselines", "fastest"), 'baselines: there is no "fastest"; there are eager-float32'),
        (("image", "--model", "tiny-dit"), "diffusers' DiTPipeline draws 1000 classes, not 10"),
    ],
)
def test_what_makes_no_sense_is_an_error(compare: Run, words: tuple[str, ...], told: str) -> None:
    error = compare(*words, *(() if "--model" in words else ("--model", "tiny-sd3"))).exception
    assert isinstance(error, InvalidValue) and told in error.message
