"""The bounds of tests/parts/close.py: what is asserted and what is written down, and the table that is made of it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.bounds import Seen, compared, files, run, table
from tests.parts.close import apart, beyond_rounding, close, each, furthest, relative

ONES = np.ones(4)


@pytest.fixture(autouse=True)
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong here on purpose belongs in no list."""
    monkeypatch.delenv("BOUNDS", raising=False)


def test_close_and_apart_leave_a_gap_of_ten() -> None:
    close(ONES * 1.01, ONES, 0.02)
    apart(ONES * 1.21, ONES, 0.02)
    for wrong in (ONES * 1.03, ONES * 1.19, ONES * np.nan):
        with pytest.raises(AssertionError, match="away"):
            close(wrong, ONES, 0.02)
    for wrong in (ONES * 1.01, ONES * 1.19, ONES * np.nan):
        with pytest.raises(AssertionError, match="another row"):
            apart(wrong, ONES, 0.02, of="another row:")
    with pytest.raises(AssertionError, match=r"\(3,\) and \(4,\)"):
        close(ONES[1:], ONES, 1.0)


def test_the_measures() -> None:
    wanted, found = np.array([4.0, 0.5, 0.0]), np.array([4.0, 0.6, 0.0])
    assert relative(found, wanted) == pytest.approx(0.1 / np.hypot(4, 0.5))
    assert furthest(found, wanted) == pytest.approx(0.025) and each(found, wanted) == pytest.approx(0.2)
    assert beyond_rounding(np.array([4, 1, 0]), np.array([4.5, 0.6, 0.4])) == 0
    assert beyond_rounding(np.array([5, 1, 0]), np.array([4.3, 0.6, 0.4])) == pytest.approx(0.2)


@pytest.mark.slow
def test_what_is_compared_is_written_down() -> None:
    test = "tests/samplers/test_schedules.py::test_alpha_bar_is_that_of_diffusers"
    found, passed = run([test], "here", {})
    assert passed and len(found) == 12 and {one.kind for one in found} == {"close", "apart"}
    assert compared(found) == [test] and {one.file for one in found} <= {*files()}
    lines, good = table(found)
    assert good and len(lines) == 3 and lines[2].startswith("| tests/samplers/test_schedules.py | 2e-05 |")


@pytest.mark.parametrize(
    ("seen", "control", "good"), [(1e-6, 1e-3, True), (2e-6, 1e-3, False), (1e-6, None, False), (0.0, 1e-3, True)]
)
def test_a_bound_needs_headroom_and_a_control(seen: float, control: float | None, good: bool) -> None:
    found = [Seen("a.py::test_x[1]", "close", 1e-5, value, "here") for value in (seen, seen / 2)]
    found += [Seen("a.py::test_y", "apart", 1e-5, control, "here")] if control else []
    lines, fine = table(found)
    assert fine == good and lines[2].endswith("|" if good else "too little")
