"""Traffic is the same for a seed; a recorded trace survives its file, and is scaled to a rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.bench.serve import SAMPLERS, kinds
from app.errors import InvalidValue
from tests.bench import recorded as traces
from tests.bench.recorded import record
from tests.parts.engine import card

CARD = card(limits={"num_inference_steps": 250, "sizes": {"min": 16, "max": 64, "multiple": 16}})


def test_a_trace_round_trips_and_is_the_same_for_a_seed(tmp_path: Path) -> None:
    drawn = record(CARD, "mixed", 5.0, 60.0, 3)
    assert drawn == record(CARD, "mixed", 5.0, 60.0, 3) != record(CARD, "mixed", 5.0, 60.0, 4)
    drawn.write(tmp_path / "trace.jsonl")
    assert traces.read(tmp_path / "trace.jsonl") == drawn


def test_mixed_is_thirteen_kinds_and_homogeneous_one() -> None:
    mixed = record(CARD, "mixed", 20.0, 60.0, 0)
    bodies = [one.body for one in mixed.arrivals]
    assert {one.work for one in mixed.kinds()} == {one.work for one in kinds(CARD, "mixed")}
    assert len(mixed.kinds()) == 13 and len(record(CARD, "homogeneous", 20.0, 60.0, 0).kinds()) == 1
    assert {one.kind for one in mixed.arrivals} == {"short", "medium", "long"}
    assert {min(b["num_inference_steps"] for b in bodies), max(b["num_inference_steps"] for b in bodies)} == {4, 50}
    unguided = sum(one.body["guidance_scale"] == 0 for one in mixed.kinds())
    assert unguided == 7


def test_times_scale_to_a_mean_rate_and_the_trace_repeats() -> None:
    drawn = record(CARD, "mixed", 5.0, 20.0, 0)
    double = drawn.at_rate(2 * drawn.rate, 10.0)
    assert len(double) == len(drawn.arrivals)
    assert [one.at for one in double] == pytest.approx([one.at / 2 for one in drawn.arrivals])
    again = drawn.at_rate(2 * drawn.rate, 20.0)
    assert len(again) == 2 * len(double) and again[len(double)].at == pytest.approx(10 + double[0].at)
    assert [one.at for one in again] == sorted(one.at for one in again)


FACTS = '{"seconds": 1}\n'


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        ("", 1), ("{}\n", 1), ('{"seconds": Infinity}\n', 1), (FACTS + '{"at": "x"}\n', 2), (FACTS + "[]\n", 2),
        (FACTS + '{"at": NaN, "class": "a", "body": {}}\n', 2),
        (FACTS + '{"at": 0, "class": "a", "body": {}}\n{"at": 0, "class": "a"}\n', 3),
    ],
)  # fmt: skip
def test_a_file_that_is_no_trace_is_named_with_its_line(tmp_path: Path, lines: str, number: int) -> None:
    (tmp_path / "bad").write_text(lines)
    with pytest.raises(InvalidValue, match=f"line {number}"):
        traces.read(tmp_path / "bad")


@pytest.mark.parametrize(("name", "kinds"), [("mixed", 13), ("homogeneous", 1)])
def test_the_traces_that_are_kept_can_be_read(name: str, kinds: int) -> None:
    kept = traces.read(Path(__file__).parent / "traces" / f"{name}.jsonl")
    assert len(kept.kinds()) == kinds and kept.facts["name"] == name


def test_a_file_that_is_no_text_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidValue, match="line 1"):
        traces.read(tmp_path / "bad")


def test_what_is_drawn_can_be_drawn_by_diffusers_too() -> None:
    samplers = {one.body["sampler"] for one in record(CARD, "mixed", 20.0, 60.0, 0).arrivals}
    assert len(samplers) == 3 and samplers <= set(SAMPLERS[CARD.family])
