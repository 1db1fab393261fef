"""The device of these tests. Each runs on the CPU by `make test`, and on the first GPU by `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from app.cards.cards import read_cards
from app.pool.pool import Pool
from tests.parts.engine import load_all

Opened = Callable[..., Pool]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Asked for a GPU where torch sees none, the tests fail: nobody shall take silence for a pass."""
    name = str(request.param)
    assert name == "cpu" or torch.cuda.is_available(), "make test-gpu: torch sees no GPU here"
    torch.backends.cudnn.allow_tf32 = False  # as the engine's process has it in float32
    return name


@pytest.fixture
def opened(tiny: Path) -> Iterator[Opened]:
    """Opens pools that have loaded what they are asked for, and closes them."""
    pools: list[Pool] = []

    def open_pool(device: str, dtype: torch.dtype = torch.float32, only: tuple[str, ...] = (), **more: object) -> Pool:
        cards = {name: card for name, card in read_cards(tiny).items() if name in only or not only}
        pools.append(Pool(cards, device, dtype, **more))
        return pools[-1] if "budget" in more else load_all(pools[-1])

    yield open_pool
    for pool in pools:
        pool.close()
