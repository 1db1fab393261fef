"""`measure_steps` runs the engine's own step, at every width asked for; its counted work is that of a formula."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.bench import engine
from app.bench.engine import forward_work, measure_steps
from tests.families.plain import load
from tests.parts.tiny import write_flux


def test_every_width_is_measured_by_the_engines_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, plain, seen = load(tiny / "tiny-sd3"), engine.denoise_step, []

    def spied(family, slots, rows):
        sums = plain(family, slots, rows)
        seen.append((len(sums), bool(sums.isfinite().all())))
        return sums

    monkeypatch.setattr(engine, "denoise_step", spied)
    found = measure_steps(family, 32, 48, (1, 3), 2, {"matmul_gflops": 1.0, "copy_gbytes": 1.0})
    assert sorted(seen) == [(1, True)] * 4 + [(3, True)] * 4
    for one in found:
        assert {name: one[name] for name in ("gflop", "mbytes")} == forward_work(family, 32, 48, one["passes"])
        assert 0 < one["ms"]["least"] <= one["ms"]["median"] <= one["ms"]["most"]
        assert one["share_of_floor"] == pytest.approx(one["floor_ms"] / one["ms"]["median"], rel=0.01)


@pytest.mark.parametrize(("gflops", "gbytes"), [(1.0, 1e9), (1e9, 1.0)])
def test_the_floor_is_the_larger_of_the_two_times(tiny: Path, gflops: float, gbytes: float) -> None:
    most = {"matmul_gflops": gflops, "copy_gbytes": gbytes}
    (one,) = measure_steps(load(tiny / "tiny-sd3"), 32, 32, (1,), 1, most)
    assert one["floor_ms"] == pytest.approx(1e3 * one["gflop"] if gflops == 1 else one["mbytes"], abs=1e-4)


@pytest.mark.parametrize("passes", [1, 6])
def test_flops_of_a_dit_by_hand(tiny: Path, passes: int) -> None:
    """Two blocks, 16 tokens of 32 channels: two flops a multiply-add."""
    family = load(tiny / "tiny-dit")
    depth, tokens, width, patch = 2, 16, 32, 2 * 2 * 4
    embed = 256 * width + width * width  # of the timestep; a label's is looked up. Once, not once a block
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2 + 6 * width**2
    ends = tokens * patch * width + 2 * width**2 + tokens * width * 2 * patch
    found = forward_work(family, 32, 32, passes)
    assert found["gflop"] == 2 * passes * (embed + depth * block + ends) / 1e9


def test_bytes_are_the_weights_once_and_what_goes_in_and_out(tiny: Path) -> None:
    family = load(tiny / "tiny-sd3")
    weights = sum(weight.nbytes for weight in family.network.parameters())
    latent, text, pooled = 4 * 4 * 8 * 8, 4 * 48 * 48, 4 * 40
    for passes in (1, 4):
        moved = weights + passes * (2 * latent + text + pooled)
        assert forward_work(family, 32, 32, passes)["mbytes"] == moved / 1e6


def test_a_flux_has_some(tmp_path: Path) -> None:
    write_flux(tmp_path / "flux", dev=True)
    assert forward_work(load(tmp_path / "flux"), 32, 32, 2)["gflop"] > 0
