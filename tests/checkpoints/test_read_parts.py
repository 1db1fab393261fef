"""Layout: which parts a card has and where they lie; folders that lie are refused by name."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from app.cards.card import Card, Source
from app.cards.cards import read_cards
from app.cards.folder import CLIPS_BY_DEFAULT, ModelFolder, check_schedule
from app.checkpoints.parts import read_parts
from app.errors import CheckpointError, NotDownloaded
from tests.parts.tiny import write_dit


@pytest.fixture(scope="module")
def cards(tiny: Path) -> dict[str, Card]:
    return read_cards(tiny)


@pytest.fixture
def dit(tmp_path: Path) -> Card:
    """A DiT whose files a test may spoil."""
    write_dit(tmp_path / "tiny-dit")
    return read_cards(tmp_path)["tiny-dit"]


def edit_index(card: Card, **entries: Any) -> None:
    file = card.folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_parts_of_the_cards_own_folder(cards: dict[str, Card]) -> None:
    parts = {part.name: part for part in read_parts(cards["tiny-dit"], cards)}
    assert parts.keys() == {"transformer", "vae"}
    assert parts["transformer"].class_name == "DiTTransformer2DModel"
    assert parts["vae"].folder == cards["tiny-dit"].folder / "vae"


def test_parts_that_another_cards_folder_holds(cards: dict[str, Card]) -> None:
    assert read_parts(cards["tiny-sd3-turbo"], cards) == read_parts(cards["tiny-sd3"], cards)
    without = {part.name for part in read_parts(cards["tiny-sd3-no-t5"], cards)}
    assert "text_encoder_2" in without and not without & {"text_encoder_3", "tokenizer_3"}


def test_an_absent_part_is_a_pair_of_nulls(cards: dict[str, Card], tmp_path: Path) -> None:
    own = {**cards["tiny-sd3"].model_dump(), "folder": tmp_path}
    index = json.loads((cards["tiny-sd3"].folder / "model_index.json").read_text())
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None], "image_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **absent}))
    names = {part.name for part in ModelFolder(Card(**own), {}).parts()}
    assert "text_encoder_2" in names and not names & absent.keys()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"vae": ["diffusers", "os.system"]}, 'vae: "os.system" is not a class'),
        ({"vae": ["my_code", "CLIPTokenizer"]}, 'vae: "CLIPTokenizer" is not a class'),
        ({"safety": ["diffusers", "AutoencoderKL"]}, "safety"),
        ({"../vae": ["diffusers", "AutoencoderKL"]}, '"../vae" is not the name of a part'),
        ({"/etc": ["diffusers", "AutoencoderKL"]}, '"/etc" is not the name of a part'),
        ({"vae": ["diffusers"]}, "vae: not a pair"),
        ({"vae": [1, 2]}, "vae: not a pair"),
        ({"vae": [None, None]}, "vae: missing"),
    ],
    ids=str,
)
def test_an_index_that_lies(dit: Card, entries: dict[str, Any], reason: str) -> None:
    edit_index(dit, **entries)
    with pytest.raises(CheckpointError, match=reason):
        read_parts(dit, {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"vae": ' * 5000])
def test_a_corrupt_index(dit: Card, text: str) -> None:
    (dit.folder / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        read_parts(dit, {})


def test_missing_folders(dit: Card, cards: dict[str, Card]) -> None:
    (dit.folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index\.json: missing"):
        read_parts(dit, {})
    with pytest.raises(CheckpointError, match="does not exist"):
        read_parts(dit.model_copy(update={"source": Source(path="elsewhere")}), {})
    lost = cards["tiny-sd3-turbo"].model_copy(update={"components": {"vae": "tiny-sd3/nothing"}})
    with pytest.raises(CheckpointError, match=r"nothing: missing, though another card's components\.vae"):
        read_parts(lost, cards)


def test_a_repository_is_looked_for_in_the_local_cache_only(
    dit: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(repo="facebook/DiT-XL-2-256", revision="a" * 40)
    with pytest.raises(NotDownloaded, match=f"not downloaded: run `instep models pull {dit.id}`"):
        read_parts(dit.model_copy(update={"source": source}), {})
    borrower = dit.model_copy(update={"id": "borrower", "components": {"vae": f"{dit.id}/vae"}})
    with pytest.raises(NotDownloaded, match=r"^borrower: its vae is not downloaded: run `instep models pull borrower`"):
        read_parts(borrower, {dit.id: dit.model_copy(update={"source": source})})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--facebook--DiT-XL-2-256"
    (cached / "refs").mkdir(parents=True)
    shutil.copytree(dit.folder, cached / "snapshots" / ("a" * 40))
    hub = dit.model_copy(update={"source": source, "folder": tmp_path})
    assert len(read_parts(hub, {})) == 2
    (cached / "snapshots" / ("a" * 40) / "vae" / "config.json").unlink()
    with pytest.raises(NotDownloaded, match=f"its vae is not downloaded: run `instep models pull {dit.id}`"):
        read_parts(hub, {})


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"_class_name": "DDIMScheduler"}, r"clip_sample is true \(the default of DDIMScheduler\)"),
        ({"_class_name": "DDPMScheduler", "thresholding": False}, "clip_sample is true"),
        ({"_class_name": "EulerDiscreteScheduler", "clip_sample": True}, "clip_sample is true:"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": True}, "thresholding is true"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False}, None),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None),
    ],
    ids=str,
)
def test_a_schedule_that_clips_does_not_load(dit: Card, config: dict[str, Any], refused: str | None) -> None:
    (dit.folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    if refused is None:
        assert read_parts(dit, {})
        return
    with pytest.raises(CheckpointError, match=rf"scheduler_config\.json: {refused}"):
        read_parts(dit, {})


def test_the_classes_that_clip_by_default_are_diffusers() -> None:
    """Of the image schedulers; those of video, of inpainting and of unCLIP cannot stand in these folders."""
    found = set()
    for name in dir(diffusers):
        if name.endswith("Scheduler") and inspect.isclass(kind := getattr(diffusers, name)):
            default = inspect.signature(kind.__init__).parameters.get("clip_sample")
            if default is not None and default.default is True:
                found.add(name)
    assert found >= CLIPS_BY_DEFAULT
    assert found - CLIPS_BY_DEFAULT <= {"CogVideoXDPMScheduler", "RePaintScheduler", "UnCLIPScheduler"}


def test_without_a_scheduler_the_card_is_the_authority(tmp_path: Path) -> None:
    check_schedule(tmp_path)
