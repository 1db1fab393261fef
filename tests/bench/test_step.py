"""`measure_steps` runs the engine's own step, at every width asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.bench import step
from app.bench.machine import Ceilings
from app.bench.step import measure_steps
from app.bench.work import forward_work
from app.errors import InvalidValue
from tests.families.plain import load


def test_every_width_is_measured_by_the_engines_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, plain, seen = load(tiny / "tiny-sd3"), step.denoise_step, []

    def spied(family, slots, plan):
        sums = plain(family, slots, plan)
        seen.append((len(sums), bool(sums.isfinite().all())))
        return sums

    monkeypatch.setattr(step, "denoise_step", spied)
    found = measure_steps(family, (32, 48), (1, 3), 2, Ceilings(1e9, 1e9))
    assert sorted(seen) == [(1, True)] * 4 + [(3, True)] * 4
    for one in found:
        assert one.work == forward_work(family, 32, 48, 24, one.passes)
        assert one.floor == max(one.work) / 1e9 and one.share == one.floor / one.time.median
        assert 0 < one.time.least <= one.time.median <= one.time.most and one.time.samples == 2


def test_a_size_that_the_network_has_not_is_refused(tiny: Path) -> None:
    with pytest.raises(InvalidValue, match="32x32"):
        measure_steps(load(tiny / "tiny-dit", torch.float32), (64, 64), (1,), 1, Ceilings(1.0, 1.0))
