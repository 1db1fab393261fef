"""Timing: whose turn it is, what is counted, and what is said of it."""

from __future__ import annotations

from app.bench.timing import Spread, alternate, spread, turns


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
