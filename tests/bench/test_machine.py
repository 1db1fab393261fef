"""The machine: its ceilings are rates of real work, and its facts say what a number was taken on."""

from __future__ import annotations

import re

import pytest
import torch

from app.bench import machine
from app.bench.machine import Ceilings, ceilings, facts

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
