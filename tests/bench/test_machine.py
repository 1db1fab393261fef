"""The machine: its ceilings are rates of real work, its facts say what a number was taken on, its clock takes turns."""

from __future__ import annotations

import re

import pytest
import torch

from app.bench import machine
from app.bench.machine import Ceilings, Spread, alternate, ceilings, facts, spread, turns

CPU = torch.device("cpu")


def test_the_floor_is_the_larger_of_the_two_times() -> None:
    measured = Ceilings(flops=100.0, bytes=10.0)
    assert measured.floor(200.0, 5.0) == 2.0
    assert measured.floor(50.0, 30.0) == 3.0


def test_ceilings_are_the_work_over_its_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that gives every call a second: the work of the largest matrix, and a copy's bytes, both ways."""
    monkeypatch.setattr(machine, "MATMULS", {"cpu": (8, 32, 16)})
    monkeypatch.setattr(machine, "COPIED", {"cpu": 4096})
    now = iter(range(10**6))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(now)))
    assert ceilings(CPU, torch.float32) == Ceilings(2 * 32**3, 2 * 4096)


def test_facts_name_the_machine_the_versions_and_the_commit() -> None:
    found = facts(CPU, torch.bfloat16)
    assert found["dtype"] == "bfloat16"
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", str(found["date"]))
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?|\S*-g[0-9a-f]{7,40}\+?|", str(found["commit"]))
    assert found["machine"]


def test_turns_go_there_and_back() -> None:
    assert "".join(turns("ab", 4)) == "abbaabba"
    assert "".join(turns("abc", 3)) == "abccbaabc"


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, 4)


def test_warm_ups_run_and_are_not_counted() -> None:
    calls: list[str] = []

    def way(name: str, cold: float, warm: float) -> float:
        calls.append(name)
        return cold if calls.count(name) <= 2 else warm

    found = alternate({"a": lambda: way("a", 9.0, 1.0), "b": lambda: way("b", 8.0, 2.0)}, rounds=3)
    assert found == {"a": Spread(1.0, 1.0, 1.0, 3), "b": Spread(2.0, 2.0, 2.0, 3)}
    assert "".join(calls) == "abba" + "abbaab"
