"""Random weights are an ordinary model folder: it loads through the pool, draws, and is nowhere zero."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from app.bench import subject
from app.bench.subject import write_random
from app.cards.cards import read_cards
from app.errors import CheckpointError
from app.pool.pool import Pool
from app.request import Prompt
from tests.families.plain import ask, serve
from tests.parts.engine import load_all
from tests.parts.tiers import tiers
from tests.parts.tiny import write_flux
from tests.parts.tiny_parts import read_state
from tests.parts.tiny_unets import write_unet


def test_they_load_through_the_pool_and_draw(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shards, as large networks are; the configs are those of the card whose components it names."""
    monkeypatch.setattr(subject, "SHARD", 10_000)
    cards = read_cards(tiny)
    card = write_random(cards["tiny-sd3-turbo"], cards, tmp_path, torch.float32)
    assert card.source.path == "." and not card.components
    assert card.limits == cards["tiny-sd3-turbo"].limits and card.schedule == cards["tiny-sd3-turbo"].schedule
    assert len(list((tmp_path / card.id / "transformer").glob("*.safetensors"))) > 2
    pool = load_all(Pool(read_cards(tmp_path), "cpu", torch.float32))
    (drawn,) = serve(pool, ask(card.id, Prompt("red"), steps=3, guidance=3.0, sampler="flow_euler"))
    family = pool.family(card.id)
    pool.close()
    assert family is not None and all(family.clips) and family.t5
    assert all(bool((value != 0).all()) for value in family.network.parameters())
    assert np.isfinite(drawn.latents).all() and drawn.pixels.std() > 0


def test_every_weight_is_random_in_the_format_and_norms_are_one(tiny: Path, tmp_path: Path) -> None:
    cards = read_cards(tiny)
    write_random(cards["tiny-dit"], cards, tmp_path, torch.bfloat16)
    state = read_state(tmp_path / "tiny-dit" / "vae")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert all(bool((value != 0).all()) for value in state.values())
    norms = [value for name, value in state.items() if name.endswith("norm1.weight")]
    assert norms and all(bool((value == 1).all()) for value in norms)
    kernel = state["decoder.conv_in.weight"].float()
    assert 0.015 < kernel.std() < 0.025 and abs(kernel.mean()) < 0.005


@pytest.mark.parametrize(
    "name", tiers(zip(["tiny-refiner", "tiny-sd15", "tiny-sdxl"], strict=True), "tiny-refiner".__eq__)
)
def test_a_unet_without_its_tokenizers_draws(tmp_path: Path, name: str) -> None:
    """Of configs alone, those of another card's parts too: texts are zeros."""
    for folder in {name, "tiny-sdxl"}:
        write_unet(tmp_path / "here" / folder, folder.removeprefix("tiny-"))
    for file in (*(tmp_path / "here").glob("*/tokenizer*/*"), *(tmp_path / "here").rglob("*.safetensors")):
        file.unlink()
    cards = read_cards(tmp_path / "here")
    card = write_random(cards[name], cards, tmp_path / "made", torch.float32)
    pool = load_all(Pool(read_cards(tmp_path / "made"), "cpu", torch.float32))
    (drawn,) = serve(pool, ask(card.id, Prompt("red"), steps=2, guidance=3.0, sampler="euler", size=(40, 24)))
    pool.close()
    assert np.isfinite(drawn.latents).all() and drawn.latents.std() > 0


def test_an_encoder_without_its_tokenizer_is_left_out(tmp_path: Path) -> None:
    """As beside the shipped cards of the Hub's models, which have configs alone."""
    write_flux(tmp_path / "here" / "flux", dev=True)
    for file in (tmp_path / "here" / "flux").glob("tokenizer_2/*"):
        file.unlink()
    for file in (tmp_path / "here").rglob("*.safetensors"):
        file.unlink()
    cards = read_cards(tmp_path / "here")
    card = write_random(cards["flux"], cards, tmp_path / "made", torch.float32)
    index = json.loads((card.folder / "model_index.json").read_text())
    assert index["text_encoder_2"] == index["tokenizer_2"] == [None, None] != index["text_encoder"]
    pool = load_all(Pool({"flux": card}, "cpu", torch.float32))
    request = ask("flux", Prompt("red"), steps=2, guidance=1.0, sampler="flow_euler", text_length=32, embedded=3.5)
    (drawn,) = serve(pool, request)
    pool.close()
    assert np.isfinite(drawn.latents).all()


def test_a_card_without_configs_is_refused(tiny: Path, tmp_path: Path) -> None:
    cards = read_cards(tiny)
    bare = cards["tiny-dit"].model_copy(update={"folder": tmp_path / "nowhere", "id": "bare"})
    with pytest.raises(CheckpointError, match="bare: random weights need the configs beside the card"):
        write_random(bare, cards, tmp_path, torch.float32)
