"""The machine: its ceilings are rates of real work, its facts say what a number was taken on, its clock takes turns."""

from __future__ import annotations

import re

import pytest
import torch

from app.bench import machine
from app.bench.machine import alternate, ceilings, facts, milliseconds, turns
from app.settings import Settings

CPU = torch.device("cpu")


def test_ceilings_are_the_work_over_its_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that gives every call a second: the work of the largest matrix, and a copy's bytes, both ways."""
    monkeypatch.setattr(machine, "MATMULS", {"cpu": (8, 32, 16)})
    monkeypatch.setattr(machine, "COPIED", {"cpu": 4096})
    now = iter(range(10**6))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(now)))
    assert ceilings(CPU, torch.float32) == {"matmul_gflops": 2 * 32**3 / 1e9, "copy_gbytes": 2 * 4096 / 1e9}


def test_facts_name_the_machine_the_versions_and_the_commit() -> None:
    found = facts(Settings(devices="cpu", dtype="bfloat16", threads=3))
    assert found["dtype"] == "bfloat16"
    assert found["torch"] == torch.__version__
    assert found["threads"] == 3
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", str(found["date"]))
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?|\S*-g[0-9a-f]{7,40}\+?|", str(found["commit"]))
    assert found["machine"]


def test_turns_go_there_and_back() -> None:
    assert "".join(turns("ab", 4)) == "abbaabba"
    assert "".join(turns("abc", 3)) == "abccbaabc"


def test_milliseconds_are_the_median_and_both_ends() -> None:
    assert milliseconds([3.0, 1.0, 2.0, 10.0]) == {"median": 2500.0, "least": 1000.0, "most": 10000.0}


def test_warm_ups_run_and_are_not_counted() -> None:
    calls: list[str] = []

    def way(name: str, cold: float, warm: float) -> float:
        calls.append(name)
        return cold if calls.count(name) <= 2 else warm

    found = alternate({"a": lambda: way("a", 9.0, 1.0), "b": lambda: way("b", 8.0, 2.0)}, rounds=3)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(calls) == "abba" + "abbaab"
