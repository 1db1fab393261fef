"""Clients that leave stop the forwards for them, and for nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.leaving import CLIENTS, SEEN, leave

pytestmark = pytest.mark.slow


def test_forwards_stop_within_one_step_of_the_last_client_that_leaves(tiny: Path, tmp_path: Path) -> None:
    found = leave(tiny, "tiny-sd3", 100, tmp_path / "notes")
    assert found["cancels"] == CLIENTS and found["before"] > 0, found
    assert found["forwards"] <= 1 and found["others"] > 1 and found["stayed"] == [200], found


def test_they_would_have_gone_on(tiny: Path, tmp_path: Path) -> None:
    """The control: the same clients leave an engine that does not act on cancels."""
    found = leave(tiny, "tiny-sd3", 100, tmp_path / "notes.deaf")
    assert found["cancels"] == CLIENTS and found["forwards"] >= SEEN, found
