"""Fixtures of the worker tests."""

import pytest

from app.worker import keeper, link


@pytest.fixture
def quick_restarts(monkeypatch):
    """Back-off from 50 ms, and little patience with processes that will not stop."""
    monkeypatch.setattr(keeper, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(link, "_EXIT", 0.3)
