"""The picture of a comparison holds every policy and class that was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import plot


def test_the_last_json_line_of_a_run_becomes_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latency = {"all": {"p50": 1.5, "p95": 4.25}, "short": {"p50": 0.25, "p95": 0.5}}
    policies = {name: {"latency": latency} for name in ("continuous", "static")}
    found = {"model": "a-card", "load": 0.9, "baseline": "static", "rate": 1.5, "policies": policies}
    (tmp_path / "run.log").write_text(f"a table\n{json.dumps(found)}\nend\n")
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "run.log"), str(tmp_path / "out.svg")])
    plot.main()
    drawn = (tmp_path / "out.svg").read_text()
    told = [line for line in drawn.splitlines() if line.strip().startswith("<!--")]
    for words in (
        "continuous",
        "static",
        "short",
        "all",
        "4.2",
        "a-card at 0.9 of static's capacity (1.50 requests/s)",
    ):
        assert any(words in line for line in told), words
