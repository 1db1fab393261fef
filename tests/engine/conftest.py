"""Tiny random checkpoints and a pool that has loaded them, once for the engine's tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.cards.card import read_cards
from app.pool.pool import Pool
from tests.tiny import write_models


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def load_all(pool: Pool) -> Pool:
    for name in pool.cards:
        pool.want(name)
    deadline = time.monotonic() + 60
    while not all(pool.resident(name, "denoise") for name in pool.cards):
        for name in pool.cards:
            assert pool.failure(name) is None, pool.failure(name)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pool


@pytest.fixture(scope="session")
def tiny_pool(tiny_models: Path) -> Iterator[Pool]:
    pool = load_all(Pool(read_cards(tiny_models), "cpu", torch.float32))
    yield pool
    pool.close()
