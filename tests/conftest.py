"""What tests of any folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

SLOW_PATIENCE = 600
"""Seconds that a slow test may take; the others have the timeout of pyproject.toml."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_PATIENCE))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
