"""Every block of every README that is marked as run, run as it stands, in the order of its document."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.readmes.blocks import BLOCKS, Block
from tests.readmes.stand import Stand, clone

NEEDS = {
    "Three pictures": (
        "dit-xl-2-256",
        "sd3-medium",
        "sd3.5-large",
        "sd3.5-large-turbo",
        "flux.1-schnell",
        "sd2.1",
        "sdxl",
        "sdxl-refiner",
    ),
    "SDXL with its refiner": ("sdxl", "sdxl-refiner"),
    "A refiner": ("sdxl", "sdxl-refiner"),
}
"""The models that the text over a block has the reader get first, by its heading."""
QUICK = "Five minutes"
"""The heading whose requests to a server `make test` runs; `make test-all` runs all other blocks."""


@pytest.fixture(scope="module")
def stand_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Stand]]:
    """Gives each document one fresh folder."""
    stands: dict[str, Stand] = {}
    written = clone(tmp_path_factory.mktemp("clone"))
    with ExitStack() as open_stands:

        def get(document: str) -> Stand:
            if document not in stands:
                stands[document] = open_stands.enter_context(Stand(tmp_path_factory.mktemp("readme"), written))
            return stands[document]

        yield get


def use_file(stand: Stand, file: str) -> None:
    """What a block became that is the content of a file is read by the program that it is for."""
    if file.endswith("card.toml"):
        assert stand.call(["instep", "models", "show", Path(file).parent.name]).startswith("id ")
    else:
        stand.serve(f"INSTEP_API_KEYS_FILE={file} instep serve")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://localhost:{stand.port}/v1/models", timeout=30)


def cases() -> list[object]:
    chosen = [block for block in BLOCKS if block.mark == "run"]
    quick = [block for block in chosen if block.heading == QUICK and "localhost" in block.text]
    marks = [() if block in quick else (pytest.mark.slow,) for block in chosen]
    return [pytest.param(block, id=str(block), marks=mark) for block, mark in zip(chosen, marks, strict=True)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", cases())
def test_a_block_runs_as_it_stands(stand_of: Callable[[str], Stand], block: Block) -> None:
    stand = stand_of(block.document)
    stand.prepare(block.heading, *NEEDS.get(block.heading, ()))
    stand.run(block)
    if block.file:
        use_file(stand, block.file)
