"""A step of the training loop against plain autograd and AdamW on the whole batch."""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from common import Clock, Workers
from loop import Training
from torch import Tensor, nn

from tests.parts.close import FORWARD, apart, close, furthest


class Turned(nn.Module):
    """A network whose gradients come out of autograd transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t().contiguous()).pow(2).mean()


def options(work: Path, threads: int) -> argparse.Namespace:
    return argparse.Namespace(
        work=work, minutes=1e-4, batch=8, rate=1e-2, every=10**9, threads=threads, device="cpu", dtype="float32"
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_is_plain_adamws(tmp_path: Path, threads: int) -> None:
    torch.manual_seed(0)
    ours, x = Turned(), torch.randn(8, 3)
    theirs = copy.deepcopy(ours)
    used = torch.get_num_threads()
    workers, training = Workers(threads), Training(ours, options(tmp_path, threads))
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01, foreach=False)
    for _ in range(3):
        before = ours.weight.detach().clone()
        loss = training.advance(workers, [partial(ours, part) for part in x.chunk(threads)], 1e-2)
        whole = theirs(x)
        close(loss, whole, FORWARD)
        plain.zero_grad()
        whole.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
    torch.set_num_threads(used)
    close(ours.weight, theirs.weight, FORWARD, furthest)
    apart(before, theirs.weight, FORWARD, furthest, of="a step less:")
    assert torch.equal(ours.unused, theirs.unused)


def test_the_time_that_a_process_is_stopped_is_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("common.time.monotonic", lambda: now)
    clock = Clock(10, used=60)
    for step in (2, 2, 3600, 2):
        now += step
        clock.tick()
    assert clock.used == 60 + 2 + 2 + Clock.LONGEST + 2 and clock.share == pytest.approx(126 / 600)


def test_products_are_in_bfloat16_where_that_is_asked(tmp_path: Path) -> None:
    used, seen = torch.get_num_threads(), []
    linear = nn.Linear(4, 4)

    def loss() -> Tensor:
        out = linear(torch.ones(2, 4))
        seen.append(out.dtype)
        return out.float().sum()

    for autocast in (None, "cpu"):
        Workers(1, autocast).backward(linear, [loss])
        assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32
    torch.set_num_threads(used)
    assert seen == [torch.float32, torch.bfloat16]
