"""A device's memory: flat over a thousand requests, and enough for two models in the place of one."""

from __future__ import annotations

import sys

import pytest
import torch

from app.report import Evicted
from tests.engine.test_memory import Bounded, ask
from tests.gpu.conftest import Opened
from tests.gpu.memory import held
from tests.parts.close import SAME, close
from tests.parts.engine import Bench

pytestmark = pytest.mark.slow

PAIR = ("tiny-dit", "tiny-sd3")
REQUESTS = {"cpu": 150, "cuda:0": 1000}
BEFORE = {"cpu": 4, "cuda:0": 0}
"""Tenths before those that count: a CPU with AMX compiles kernels for each shape that it meets."""
SLACK = {"cpu": 8 << 20, "cuda:0": 1 << 20}
"""Bytes: what the last forward gathered, and what Python keeps of a process."""


def test_a_thousand_requests_leave_nothing(device: str, opened: Opened) -> None:
    """The first tenth opens slots and warms allocators."""
    pool = opened(device, torch.bfloat16, PAIR)
    count, sizes = REQUESTS[device], []
    bench = Bench(pool)
    for part in range(BEFORE[device] + 10):
        numbers = range(part * count // 10, (part + 1) * count // 10)
        bench.run(ask(PAIR[number % 2], number, number % 3 == 0) for number in numbers)
        assert len(bench.results) == len(numbers) and not bench.failures
        bench.reports.clear()
        # Less the encoded prompts, which TEXT_CACHE bounds.
        sizes.append(held(device) - bench.engine.runner.bytes["text"])
    assert sizes[-1] - sizes[-10] <= SLACK[device], sizes


def test_weights_that_left_the_device_come_back_as_they_were(device: str, opened: Opened) -> None:
    """Two models in memory for one: parked in host memory in turns, a dozen times, and drawn with in between."""
    whole = opened(device, torch.float32, PAIR)
    largest = max(model.bytes for model in whole.models.values())
    requests = [ask(PAIR[number % 2], number, number % 4 < 2) for number in range(24)]
    wanted = Bench(whole).run(requests).results
    bench = Bounded(opened(device, torch.float32, PAIR, budget=largest, host=sys.maxsize))
    for start in range(0, len(requests), 2):
        bench.answer(requests[start : start + 2])
    moves = [report for report in bench.reports if isinstance(report, Evicted)]
    assert len(moves) >= 12
    for name, one in wanted.items():
        close(bench.results[name].latents, one.latents, SAME)
