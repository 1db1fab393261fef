"""Each fault of the table once. Seconds are only guards here; `make faults` measures them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.faults.harness import Ask, Fault, Room, edits, mixed
from tests.faults.table import FAULTS
from tests.parts.close import BFLOAT16, apart

pytestmark = pytest.mark.slow

NOTICED = 10.0
"""Ten times what is promised of a kill; a stopped process is seen after 4 seconds."""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with Room(tmp_path_factory.mktemp("faults")) as room:
        yield room


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_nothing_accepted_is_lost(room: Room, fault: Fault) -> None:
    assert fault.once(room).get("noticed", 0.0) < NOTICED


def test_another_picture_would_be_seen(room: Room) -> None:
    """The control of every comparison in the table: another seed is another picture, in bits and beyond the bound."""
    for ask in (*mixed(3), *edits(3)):
        mine, (other,) = room.alone(ask)[0], room.alone(Ask(ask.body | {"seed": 1})).values()
        assert not np.array_equal(mine, other)
        if "image" not in ask.body:  # edits are compared by their bits alone: a mask keeps half of the picture
            apart(other, mine, BFLOAT16)
