"""A real Prometheus watches a real service under real traffic: behind every panel and every alert there is a series.

Only the exporter of the GPUs is played (`stage.py`): its series begin with `DCGM_`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.promql import operands
from tests.deploy.stage import BROKEN, Stage, staged
from tests.deploy.test_dashboard import PANELS, QUERIES
from tests.deploy.test_rules import needs_prometheus, rules
from tests.deploy.traffic import MISTAKES, MODELS, Traffic
from tests.parts.waiting import eventually

SECONDS = 45.0

pytestmark = [pytest.mark.slow, needs_prometheus, pytest.mark.timeout(300)]
CONDITIONS = [(rule["alert"], part) for rule in rules("alert") for part in operands(rule["expr"])]
RECORDS = [(rule["record"], expr) for rule in rules("record") for expr in (rule["record"], rule["expr"])]


@pytest.fixture(scope="module")
def traffic() -> Iterator[Traffic]:
    yield Traffic("")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, traffic: Traffic) -> Iterator[Stage]:
    """All is up, and has had its minute."""
    with staged(tmp_path_factory.mktemp("prometheus")) as stage:
        traffic.url = f"{stage.service}/v1/images/generations"
        traffic.run(SECONDS)
        yield stage


def test_the_traffic_was_mixed(stage: Stage, traffic: Traffic) -> None:
    assert traffic.outcomes["200"] > 20 and traffic.outcomes["completed"] > 5 and traffic.outcomes["edit 200"] > 1
    assert min(traffic.outcomes[name] for name in ("400", "404", "413", "503", "left", "rush left")) >= 1
    assert {name for name in traffic.outcomes if name.startswith("5")} == {"503"}


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{i}" for i, (title, _) in enumerate(QUERIES)])
def test_behind_every_panel_is_a_series(stage: Stage, title: str, query: str) -> None:
    assert stage.series(stage.expand(query)), title


@pytest.mark.parametrize(("alert", "query"), CONDITIONS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CONDITIONS)])
def test_behind_every_alert_are_series(stage: Stage, alert: str, query: str) -> None:
    instance = (stage.gpus if "DCGM_" in query else stage.service).removeprefix("http://")
    assert instance in {one["metric"].get("instance") for one in stage.series(query)}, alert


@pytest.mark.parametrize(("name", "query"), RECORDS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(RECORDS)])
def test_behind_every_record_is_a_series(stage: Stage, name: str, query: str) -> None:
    assert stage.series(query), name


def test_prometheus_has_no_complaint(stage: Stage) -> None:
    def complaints() -> list[str]:
        return [one["lastError"] for one in stage.get("targets")["activeTargets"] if one["health"] != "up"]

    eventually(lambda: not complaints(), 20, lambda: str(complaints()))
    loaded = [rule for group in stage.get("rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules("alert")) + len(rules("record"))
    assert [rule for rule in loaded if rule["health"] != "ok"] == []


def test_the_variables_have_values(stage: Stage) -> None:
    assert stage.get("label/instance/values", **{"match[]": "instep_ready"}) == [stage.service.removeprefix("http://")]
    assert set(MODELS) <= set(stage.get("label/model/values", **{"match[]": "instep_model_loaded"}))


def test_every_mistake_and_the_rush_are_refusals_by_reason(stage: Stage) -> None:
    found = {one["metric"]["reason"] for one in stage.series("instep_requests_rejected_total > 0")}
    assert {*MISTAKES, "overloaded"} <= found


def test_failures_and_outcomes_by_reason(stage: Stage) -> None:
    failed = {one["metric"]["reason"] for one in stage.series("instep_requests_failed_total > 0")}
    assert {"cancelled", "model_load_failed"} <= failed
    outcomes = {one["metric"]["outcome"] for one in stage.series("instep_requests_total > 0")}
    assert outcomes == {"answered", "failed", "cancelled", "refused"}
    loads = {(one["metric"]["model"], one["metric"]["result"]) for one in stage.series("instep_model_loads_total > 0")}
    assert loads >= {(BROKEN, "failed"), *((model, "ready") for model in MODELS)}


def test_models_take_turns_in_the_memory_there_is(stage: Stage) -> None:
    assert stage.series("instep_model_evictions_total > 0")
    kinds = {one["metric"]["kind"]: one["values"] for one in stage.series("instep_device_memory_bytes")}
    assert set(kinds) == {"weights", "slots", "text", "parked", "budget"}
    assert max(float(value) for _, value in kinds["weights"]) <= float(kinds["budget"][0][1])


def test_a_panel_about_something_else_would_be_seen(stage: Stage) -> None:
    wrong = next(query for title, query in QUERIES if title == "Occupancy").replace("occupancy", "ocupancy")
    assert not stage.series(stage.expand(wrong))


def test_stats_ask_for_one_number(stage: Stage) -> None:
    def series(panel: dict[str, Any]) -> int:
        return len(stage.get("query", query=stage.expand(panel["targets"][0]["expr"]))["result"])

    assert [panel["title"] for panel in PANELS if panel["type"] == "stat" and series(panel) != 1] == []
