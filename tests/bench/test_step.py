"""`measure_steps` runs the engine's own step, at every width asked for; its counted work is that of a formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.bench import step
from app.bench.machine import Ceilings
from app.bench.step import forward_work, measure_steps
from app.errors import InvalidValue
from tests.families.plain import load
from tests.parts.tiny import write_flux


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


@pytest.mark.parametrize("passes", [1, 6])
def test_flops_of_a_dit_by_hand(tiny: Path, passes: int) -> None:
    """Two blocks, 16 tokens of 32 channels: two flops a multiply-add."""
    family = load(tiny / "tiny-dit")
    depth, tokens, width, patch = 2, 16, 32, 2 * 2 * 4
    embed = 256 * width + width * width  # of the timestep; a label's is looked up. Once, not once a block
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2 + 6 * width**2
    ends = tokens * patch * width + 2 * width**2 + tokens * width * 2 * patch
    found = forward_work(family, 32, 32, 0, passes)
    assert found.flops == 2 * passes * (embed + depth * block + ends)


def test_bytes_are_the_weights_once_and_what_goes_in_and_out(tiny: Path) -> None:
    family = load(tiny / "tiny-sd3")
    weights = sum(weight.nbytes for weight in family.network.parameters())
    latent, text, pooled = 4 * 4 * 8 * 8, 4 * 48 * 48, 4 * 40
    for passes in (1, 4):
        assert forward_work(family, 32, 32, 24, passes).bytes == weights + passes * (2 * latent + text + pooled)


def test_work_needs_no_weights_and_every_family_has_some(tiny: Path, tmp_path: Path) -> None:
    family = load(tiny / "tiny-sd3")
    there = forward_work(family, 32, 32, 24, 2)
    family.network.to("meta")
    assert forward_work(family, 32, 32, 24, 2) == there
    write_flux(tmp_path / "flux", dev=True)
    assert forward_work(load(tmp_path / "flux"), 32, 32, 32, 2).flops > 0
