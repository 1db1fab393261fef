"""The files of deploy/prometheus are valid, each alert has a test, and the error codes in them exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from app import errors
from tests.deploy.promql import operands
from tests.deploy.stage import PROMETHEUS, tool

RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TESTS = PROMETHEUS / "tests" / "alerts.yml"
SEVERITIES = {"critical", "warning", "info"}

needs_prometheus = pytest.mark.skipif(
    not (tool("prometheus") and tool("promtool")) and not os.environ.get("CI"),
    reason="Prometheus is not installed: `make setup` fetches it where there is apt; else: apt install prometheus",
)


def rules(kind: str) -> list[dict[str, Any]]:
    """All alerts ("alert") or recording rules ("record") of our files."""
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def promtool(*words: object) -> str:
    done = subprocess.run([str(tool("promtool")), *map(str, words)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_prometheus
def test_config_and_rules_are_valid() -> None:
    assert "2 rule files found" in promtool("check", "config", "--lint=all", PROMETHEUS / "prometheus.yml")
    assert promtool("check", "rules", "--lint=all", *RULES).count("SUCCESS") == len(RULES)


@needs_prometheus
def test_every_alert_fires_and_does_not() -> None:
    assert "SUCCESS" in promtool("test", "rules", TESTS)


@needs_prometheus
def test_a_wrong_threshold_would_be_seen(tmp_path: Path) -> None:
    """The unit tests are able to fail: each alert's own threshold, moved, breaks them."""
    for name in ("rules", "tests"):
        (tmp_path / name).mkdir()
    for file in (*RULES, TESTS):
        (tmp_path / file.parent.name / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    alerts = tmp_path / "rules" / "alerts.yml"
    alerts.write_text(alerts.read_text(encoding="utf-8").replace("> 0.97", "> 0.99"), encoding="utf-8")
    words = [str(tool("promtool")), "test", "rules", str(tmp_path / "tests" / TESTS.name)]
    assert subprocess.run(words, capture_output=True, timeout=60).returncode != 0


def fetch(path: Path, into: Path) -> list[str]:
    """What deploy/prometheus/fetch says on a machine that has these programs and no others."""
    for name in ("bash", "mktemp", "realpath", "rm"):
        (path / name).symlink_to(str(shutil.which(name)))
    words = [str(path / "bash"), str(PROMETHEUS / "fetch"), str(into)]
    done = subprocess.run(words, env={"PATH": str(path)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_without_apt_setup_says_so_in_a_line_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (line,) = fetch(tmp_path / "bin", tmp_path)
    assert "no Prometheus" in line and "apt install prometheus" in line
    assert not (tmp_path / "prometheus").exists()


def test_what_is_on_path_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("prometheus", "promtool"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which("bash")))
    assert fetch(tmp_path / "bin", tmp_path) == ["setup: Prometheus is on PATH"]


def test_every_alert_is_in_the_unit_tests_and_in_the_table() -> None:
    names = [rule["alert"] for rule in rules("alert")]
    assert len(names) == len(set(names)) > 15
    tests = yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]
    samples = [sample for test in tests for check in test["promql_expr_test"] for sample in check["exp_samples"]]
    expected = {found[1] for one in samples if (found := re.search(r'alertname="(\w+)"', one["labels"]))}
    assert expected == set(names)
    listed = re.findall(r"^\| `(\w+)` \|", (PROMETHEUS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(names)


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in SEVERITIES
    assert set(rule["annotations"]) == {"summary", "description", "action"}
    assert all(text.endswith(".") for text in rule["annotations"].values())


def test_reasons_are_error_codes() -> None:
    named = [word for rule in rules("record") for words in re.findall(r'reason=~"([^"]+)"', rule["expr"])
             for word in words.split("|")]  # fmt: skip
    assert named and set(named) <= set(get_args(errors.Code))


@pytest.mark.parametrize(
    ("condition", "parts"),
    [
        ("up == 0", ["up"]),
        ('absent(up{job="a > b"})', ['up{job="a > b"}']),
        ("a / ignoring (kind) b > 0.95", ["a / ignoring (kind) b"]),
        ("live < all", ["live", "all"]),
        ("sum (x or y) > 1e-3\n  unless on (a) z > 0", ["sum (x or y)", "z"]),
        ("rate(a[5m]) / b > 0.5 and c{or='and'} >= 10", ["rate(a[5m]) / b", "c{or='and'}"]),
    ],
)
def test_operands(condition: str, parts: list[str]) -> None:
    assert list(operands(condition)) == parts
