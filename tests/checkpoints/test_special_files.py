"""Files of a checkpoint that are pipes, devices or without end: their model fails, and the loader goes on to others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from app.cards.cards import read_cards
from app.pool.pool import Pool
from app.report import ModelState
from tests.parts.endless import make_endless
from tests.parts.tiers import tiers
from tests.parts.waiting import eventually

MODELS = ("tiny-dit", "tiny-sd3")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(tiny, tmp_path / "models")
    # Whoever waits for a pipe still is let go, so that a failure here does not hold the end of the tests.
    for file in tmp_path.rglob("*"):
        if file.is_fifo():
            os.close(os.open(file, os.O_RDWR))


def outcome(pool: Pool, model: str) -> ModelState:
    """How the load of a model ends."""
    pool.want(model)
    ends: list[ModelState] = []

    def ended() -> bool:
        states = (change for change in pool.poll() if isinstance(change, ModelState) and change.model == model)
        ends.extend(state for state in states if state.state in ("ready", "failed"))
        return bool(ends)

    eventually(ended, why=lambda: f"the loader is held by {model}")
    return ends[0]


FILES = (
    "tiny-dit/model_index.json",
    "tiny-dit/scheduler/scheduler_config.json",
    "tiny-dit/transformer/config.json",
    "tiny-dit/transformer/diffusion_pytorch_model.safetensors",
    "tiny-dit/transformer/diffusion_pytorch_model.safetensors.index.json",
    "tiny-sd3/tokenizer/tokenizer_config.json",
    "tiny-sd3/tokenizer_3/tokenizer.json",
    "tiny-sd3/tokenizer_3/chat_template.jinja",
)
CASES = [
    (file, kind)
    for file, kind in product(FILES, ("pipe", "device", "terabyte"))
    if (file, kind) != ("tiny-dit/model_index.json", "terabyte")  # that card is refused when the cards are read
]


@pytest.mark.parametrize(("file", "kind"), tiers(CASES, lambda file, kind: CASES.index((file, kind)) % 4 == 0))
def test_the_model_fails_with_the_name_of_the_file_and_others_load(folder: Path, file: str, kind: str) -> None:
    cards = read_cards(folder)
    make_endless(folder / file, kind)
    spoiled, other = sorted(MODELS, key=lambda name: not file.startswith(name + "/"))
    pool = Pool(cards, "cpu", torch.float32)
    try:
        failed = outcome(pool, spoiled)
        assert failed.state == "failed" and Path(file).name in failed.detail
        assert any(words in failed.detail for words in ("not a regular file", "over ", "an empty file", "header"))
        assert outcome(pool, other).state == "ready"
    finally:
        pool.close()
