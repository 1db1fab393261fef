"""The dashboard's file is what the script writes, and asks only for metrics that exist; without a running server."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import yaml

from app.metrics import Metrics
from deploy.grafana import make
from tests.deploy.stage import gpu_fields
from tests.deploy.test_rules import rules
from tests.parts.servers import ROOT

PANELS = [panel for panel in json.loads(make.FILE.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
OF_OTHERS = {"scrape_duration_seconds", "process_resident_memory_bytes", "process_cpu_seconds_total"}


def names() -> set[str]:
    """Every series that a server of ours has, by its name in a query, and what our rules record."""
    collected = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    described = {family.name for family in Metrics().registry.collect()}
    made = {f"{name}{end}" for name in described for end in ("", "_total", "_bucket", "_sum", "_count")}
    return collected | made | {rule["record"] for rule in rules("record")} | OF_OTHERS


def test_the_file_is_what_the_script_writes() -> None:
    assert make.FILE.read_text(encoding="utf-8") == make.text(), "run `python -m deploy.grafana.make`"


def test_queries_ask_for_metrics_that_there_are() -> None:
    known = names()
    asked = {name for _, expr in QUERIES for name in re.findall(r"([a-z_]+:?[\w:]*)\{", expr)}
    assert asked and asked - known == set()
    ruled = {name for kind in ("alert", "record") for rule in rules(kind)
             for name in re.findall(r"\binste\w+:\w+:\w+|\binstance:\w+:\w+|\binstep_\w+", rule["expr"])}  # fmt: skip
    assert ruled and ruled - known == set()


def test_every_metric_is_on_the_dashboard() -> None:
    """A metric that nobody looks at is not worth its bytes; these two are for queries by hand."""
    text = " ".join(expr for _, expr in QUERIES) + " ".join(rule["expr"] for rule in rules("record"))
    families = {family.name for family in Metrics().registry.collect() if family.name.startswith("instep_")}
    unseen = {name for name in families if not re.search(rf"\b{name}(_total|_bucket|_sum|_count)?\b", text)}
    assert unseen == {"instep_build_info", "instep_workers"}


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = json.loads(make.text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert [(a, b) for a, b in combinations(places, 2) if overlap(a, b)] == []


def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
    return all(a[at] < b[at] + b[size] and b[at] < a[at] + a[size] for at, size in (("x", "w"), ("y", "h")))


def test_each_panel_says_what_it_shows() -> None:
    assert len(PANELS) > 30
    assert [panel["title"] for panel in PANELS if not panel["description"].endswith(".")] == []
    units = {panel["fieldConfig"]["defaults"].get("unit") or panel["options"]["yAxis"]["unit"] for panel in PANELS}
    assert units == {"none", "s", "percentunit", "bytes", "reqps", "celsius", "watt", "suffix: /s"}


def test_the_exporter_exports_what_is_asked_of_it() -> None:
    asked = {name for expr in [*(expr for _, expr in QUERIES), *(rule["expr"] for rule in rules("alert"))]
             for name in re.findall(r"DCGM_\w+", expr)}  # fmt: skip
    assert asked == set(gpu_fields())


def test_grafana_finds_prometheus_and_the_file() -> None:
    def read(name: str) -> Any:
        return yaml.safe_load((ROOT / "deploy/grafana/provisioning" / name).read_text(encoding="utf-8"))

    (source,) = read("datasources/prometheus.yml")["datasources"]
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = read("dashboards/instep.yml")["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
