"""Whether a model's files are here: each part of it missing in turn, shared ones, single files, shards, a Hub cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.api.downloads import downloaded
from app.card import Card, Source, read_cards
from tests.tiny import write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downloads") / "models"
    write_models(folder)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models, tmp_path / "models")


def states(folder: Path) -> dict[str, bool]:
    cards = read_cards(folder)
    return {name: downloaded(card, cards) for name, card in cards.items()}


def test_whole_models_are_here(here: Path) -> None:
    assert len(states(here)) == 6 and all(states(here).values())


@pytest.mark.parametrize(
    ("gone", "lacking"),
    [
        ("tiny-dit/transformer", {"tiny-dit", "tiny-dit-v", "tiny-dit-sample"}),
        ("tiny-sd3/vae/diffusion_pytorch_model.safetensors", {"tiny-sd3", "tiny-sd3-turbo", "tiny-sd3-no-t5"}),
        ("tiny-sd3/tokenizer_3", {"tiny-sd3", "tiny-sd3-turbo"}),
        ("tiny-sd3-turbo/model_index.json", {"tiny-sd3-turbo"}),
    ],
)
def test_a_part_that_is_missing_is_missed_by_all_who_share_it(here: Path, gone: str, lacking: set[str]) -> None:
    path = here / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {name for name, whole in states(here).items() if not whole} == lacking


def test_every_shard_counts(here: Path) -> None:
    folder = here / "tiny-dit" / "transformer"
    whole = folder / "diffusion_pytorch_model.safetensors"
    for shard in (1, 2):
        shutil.copy(whole, folder / f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors")
    whole.unlink()
    assert states(here)["tiny-dit"]
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert not states(here)["tiny-dit"]


def test_a_single_file_stands_for_its_part(here: Path) -> None:
    cards = read_cards(here)
    shutil.rmtree(here / "tiny-sd3" / "transformer")
    card = cards["tiny-sd3"].model_copy(update={"files": {"transformer": "one.safetensors"}})
    assert not downloaded(card, cards | {card.id: card})
    (here / "tiny-sd3" / "one.safetensors").write_bytes(b"")
    assert downloaded(card, cards | {card.id: card})
    assert downloaded(cards["tiny-sd3-turbo"], cards | {card.id: card})
    assert not downloaded(cards["tiny-sd3-turbo"], cards)


def test_an_index_that_lies_is_no_model(here: Path) -> None:
    for text in ("[]", "{", json.dumps({"_class_name": "DiTPipeline", "id2label": {"0": "red"}})):
        cards = read_cards(here)
        (here / "tiny-dit" / "model_index.json").write_text(text, encoding="utf-8")
        assert not downloaded(cards["tiny-dit"], cards)
        (here / "tiny-dit" / "model_index.json").write_text('{"id2label": {}}', encoding="utf-8")


def test_a_repository_is_looked_for_in_the_cache(here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    def of_the_hub(card: Card) -> Card:
        return card.model_copy(update={"source": Source(repo="some/model", revision="f00d"), "folder": tmp_path})

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cards = read_cards(here)
    assert not downloaded(of_the_hub(cards["tiny-dit"]), cards)
    (tmp_path / "hub" / "models--some--model" / "refs").mkdir(parents=True)
    shutil.copytree(here / "tiny-dit", tmp_path / "hub" / "models--some--model" / "snapshots" / "f00d")
    assert downloaded(of_the_hub(cards["tiny-dit"]), cards)
