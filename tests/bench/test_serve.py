"""The whole comparison, end to end: real servers, a tiny model, every request answered, one JSON line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from app.bench.replay import Answer
from app.bench.serve import Plan, latencies, ratios
from app.bench.trace import Arrival, work_of
from app.cli.bench_serve import serve
from app.errors import InvalidValue
from tests.parts.tiny import write_sd3

pytestmark = pytest.mark.slow


def test_latencies_by_class_and_what_was_in_time() -> None:
    short, long = Arrival(0, "short", {"steps": 1}), Arrival(0, "long", {"steps": 9}, deadline=5.0)
    given = [Answer(short, 0, 1.0, 200), Answer(short, 0, 4.0, 200), Answer(long, 0, 4.0, 200), Answer(long, 0, 1, 503)]
    found = latencies(given, {work_of(short.body): 1.0})
    assert list(found) == ["all", "long", "short"]
    assert found["short"] == {
        "count": 2, "p50": 2.5, "p95": pytest.approx(3.85), "p99": pytest.approx(3.97), "mean": 2.5, "attainment": 0.5,
    }  # fmt: skip
    assert found["long"]["p50"] == 4.0 and found["long"]["attainment"] == 0.5 == found["all"]["attainment"]


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


def test_the_command_answers_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sd3(tmp_path / "models" / "tiny-sd3")
    for name, value in {"CACHE": tmp_path / "cache", "DEVICES": "cpu", "DTYPE": "float32", "THREADS": 1}.items():
        monkeypatch.setenv(f"INSTEP_{name}", str(value))
    app = typer.Typer()
    app.command()(serve)
    words = ["--models", str(tmp_path / "models"), "--mix", "homogeneous", "--policies", "continuous,static"]
    words += ["--queued", "4", "--rounds", "1", "--seconds", "0.5"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["bench"] == "serve" and set(found["policies"]) == {"continuous", "static"}
    for one in found["policies"].values():
        assert one["statuses"] == {"200": 4 + found["requests"]}
        assert one["latency"]["all"]["count"] == found["requests"] and one["capacity"]["median"] > 0
        assert 1 <= one["rows"] <= 4
    assert set(found["ratios"]) == {"continuous"} and found["commit"] is not None
