"""A pool that has loaded the tiny models, once for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.cards.cards import read_cards
from app.pool.pool import Pool
from tests.parts.engine import load_all


@pytest.fixture(scope="session")
def tiny_pool(tiny: Path) -> Iterator[Pool]:
    pool = load_all(Pool(read_cards(tiny), "cpu", torch.float32))
    yield pool
    pool.close()
