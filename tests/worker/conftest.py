"""Fixtures of the worker tests."""

import pytest

from app.worker import child


@pytest.fixture
def quick_restarts(monkeypatch):
    """Back-off from 50 ms, and little patience with processes that will not stop."""
    monkeypatch.setattr(child, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(child, "PATIENCE", 0.3)
