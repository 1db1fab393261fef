"""Whether a model's files are here: each part of it missing in turn, shared ones, single files, shards, a Hub cache."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from app.cards.card import Card, Source
from app.cards.cards import read_cards
from app.cards.folder import ModelFolder
from app.errors import NotDownloaded


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with nothing in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def here(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "models")


def states(folder: Path) -> dict[str, bool]:
    cards = read_cards(folder)
    return {name: ModelFolder(card, cards).here() for name, card in cards.items()}


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


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(here: Path, name: str) -> None:
    (here / "tiny-dit" / name).unlink()
    os.mkfifo(here / "tiny-dit" / name)
    found = states(here)
    assert not found["tiny-dit"] and found["tiny-sd3"]


def test_every_shard_counts(here: Path) -> None:
    folder = here / "tiny-dit" / "transformer"
    whole = folder / "diffusion_pytorch_model.safetensors"
    names = [f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]
    for name in names:
        shutil.copy(whole, folder / name)
    listed = {"weight_map": dict(zip(("a", "b"), names, strict=True))}
    whole.rename(folder / "spare")
    assert not states(here)["tiny-dit"], "without the index, nobody knows which shards there are"
    (folder / f"{whole.name}.index.json").write_text(json.dumps(listed))
    assert states(here)["tiny-dit"]
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert not states(here)["tiny-dit"]


def test_a_single_file_stands_for_its_part(here: Path) -> None:
    cards = read_cards(here)
    (here.parent / "config").mkdir()
    shutil.copy(here / "tiny-sd3" / "transformer" / "config.json", here.parent / "config")
    shutil.rmtree(here / "tiny-sd3" / "transformer")
    card = cards["tiny-sd3"].model_copy(update={"files": {"transformer": "one.safetensors"}})
    assert not ModelFolder(card, cards | {card.id: card}).here()
    shutil.copy(next((here / "tiny-sd3" / "vae").glob("*.safetensors")), here / "tiny-sd3" / "one.safetensors")
    assert not ModelFolder(card, cards | {card.id: card}).here(), "its config.json is missing"
    shutil.copytree(here.parent / "config", here / "tiny-sd3" / "transformer")
    assert ModelFolder(card, cards | {card.id: card}).here()
    assert ModelFolder(cards["tiny-sd3-turbo"], cards | {card.id: card}).here()
    assert not ModelFolder(cards["tiny-sd3-turbo"], cards).here()


def test_an_index_that_lies_is_no_model(here: Path) -> None:
    for text in ("[]", "{", json.dumps({"_class_name": "DiTPipeline", "id2label": {"0": "red"}})):
        cards = read_cards(here)
        (here / "tiny-dit" / "model_index.json").write_text(text, encoding="utf-8")
        assert not ModelFolder(cards["tiny-dit"], cards).here()
        (here / "tiny-dit" / "model_index.json").write_text('{"id2label": {}}', encoding="utf-8")


def test_a_repository_is_looked_for_in_the_cache(here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    def of_the_hub(card: Card) -> Card:
        return card.model_copy(update={"source": Source(repo="some/model", revision="f00d"), "folder": tmp_path})

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cards = read_cards(here)
    assert not ModelFolder(of_the_hub(cards["tiny-dit"]), cards).here()
    (tmp_path / "hub" / "models--some--model" / "refs").mkdir(parents=True)
    shutil.copytree(here / "tiny-dit", tmp_path / "hub" / "models--some--model" / "snapshots" / "f00d")
    assert ModelFolder(of_the_hub(cards["tiny-dit"]), cards).here()


def on_the_hub(models: Path, name: str) -> None:
    """Turn one of the tiny models into a card of a Hub repository that is not downloaded."""
    card = models / name / "card.toml"
    text = card.read_text().replace('path = "."', f'repo = "lab/{name}"')
    shutil.rmtree(models / name)
    (models / name).mkdir()
    card.write_text(text)


def test_a_card_whose_shared_parts_are_not_downloaded_is_not_here(here: Path, empty_cache: Path) -> None:
    """tiny-sd3-turbo lies beside its card, but takes all parts from tiny-sd3."""
    on_the_hub(here, "tiny-sd3")
    found = states(here)
    assert not found["tiny-sd3-turbo"] and not found["tiny-sd3"] and found["tiny-dit"]
    cards = read_cards(here)
    with pytest.raises(NotDownloaded, match=r"^tiny-sd3-turbo: its transformer is not downloaded: run `instep models"):
        ModelFolder(cards["tiny-sd3-turbo"], cards).check()


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", b"", b"GGUF\3\0\0\0", b"<!DOCTYPE html>"],
    ids=["lfs", "empty", "gguf", "html"],
)
def test_what_stands_in_for_a_checkpoint_is_not_it(here: Path, content: bytes) -> None:
    (here / "tiny-sd3" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert {name for name, whole in states(here).items() if not whole} == {
        "tiny-sd3",
        "tiny-sd3-turbo",
        "tiny-sd3-no-t5",
    }


def test_each_file_of_a_model_counts(here: Path) -> None:
    """Take one file away, ask, put it back: what a load reads is what is asked for."""
    spare = {"special_tokens_map.json", "tokenizer_config.json", "card.toml", "scheduler_config.json", "vocab.json"}
    spare |= {"merges.txt", "generation_config.json"}  # tokenizer.json is enough
    folder = here / "tiny-sd3"
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in spare):
        cards, away = read_cards(here), here.parent / "away"
        file.rename(away)
        assert not ModelFolder(cards["tiny-sd3"], cards).here(), file.relative_to(folder)
        away.rename(file)
    assert states(here)["tiny-sd3"]
