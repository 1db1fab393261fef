"""`instep bench serve`: what it refuses before any server starts, and the trace it records."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.bench import trace as traces
from tests.parts.commands import Run, one_line


def test_a_recorded_trace_can_be_read(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    result = run("bench", "serve", "--model", "tiny-sd3", "--record", str(file), "--rate", "9", "--seconds", "20")
    assert result.exit_code == 0, result.output
    drawn = traces.read(file)
    assert f"{len(drawn.arrivals)} requests in 20 s" in " ".join(result.output.split())
    assert drawn.facts["rate"] == 9.0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--policies", ""), "policies: none is given"),
        (("--policies", "continuous,fast"), "policies: fast"),
        (
            ("--policies", "continuous", "--baseline", "static"),
            "baseline: static is not among the policies: continuous",
        ),
        (("--mix", "odd"), "mix: odd"),
        (("--trace", "{trace}", "--record", "{trace}"), "recorded already"),
        (("--trace", "{trace}"), "line 1: not a line of a trace"),
        (("--trace", "{absent}"), "absent"),
        (("--at-capacity", "inf"), "not a number that ends"),
        (("--model", "nobody"), "nobody"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Run, tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    (tmp_path / "bad").write_text("{}")
    given = [word.format(trace=tmp_path / "bad", absent=tmp_path / "absent") for word in words]
    assert told in one_line(run("bench", "serve", *given))
