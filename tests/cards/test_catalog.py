"""Models by id, alias and default; what makes a folder of cards unfit to start with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from app.cards.cards import read_cards
from app.cards.catalog import BUILT_IN, SHIPPED, Registry
from app.errors import ModelNotFound, SettingsError
from app.settings import Settings
from tests.parts.cards import TEXT, write_cards
from tests.parts.tiny import write_dit, write_sd3


def test_by_id_alias_and_default(settings: Settings) -> None:
    registry = Registry(read_cards(settings.models), settings)
    assert registry.find("tiny-label").id == "tiny-label"
    assert registry.find("gpt-image-1").id == "tiny-text"
    assert registry.find(None) is registry.find("") is registry.default
    assert registry.default.id == "tiny-text"
    assert registry.default.names == ("tiny-text", "gpt-image-1")


def opened(folder: Path, default: str = "") -> Registry:
    return Registry(read_cards(folder), Settings(models=folder, default_model=default))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("written")
    for name, write in {"emoji-dit": write_dit, "emoji-mmdit": write_sd3}.items():
        write(models / name)
    shutil.copytree(models / "emoji-dit", models / "a-dit")
    shutil.copytree(models / "emoji-mmdit", models / "sd3.5-medium")
    for folder in models.iterdir():
        card = folder / "card.toml"
        card.write_text(re.sub(r'id = "tiny-\w+"', f'id = "{folder.name}"', card.read_text(), count=1))
    return models


@pytest.fixture
def models(written: Path, tmp_path: Path) -> Path:
    """Tiny checkpoints under the ids of shipped cards: emoji-dit, emoji-mmdit, sd3.5-medium; and a user's DiT."""
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True))


def mine(models: Path) -> Path:
    """A card of the user's, last by the alphabet."""
    shutil.copytree(models / "emoji-mmdit", models / "zebra")
    card = models / "zebra" / "card.toml"
    card.write_text(card.read_text().replace('id = "emoji-mmdit"', 'id = "zebra"'))
    return models / "zebra"


def test_the_default_is_the_built_in_model_although_others_come_first(models: Path) -> None:
    assert opened(models).default.id == "emoji-mmdit"


def test_a_users_card_that_draws_prompts_is_the_default(models: Path) -> None:
    mine(models)
    assert opened(models).default.id == "zebra"
    assert opened(models, "emoji-dit").default.id == "emoji-dit", "but what is named goes before it"
    assert opened(models, "emoji-dit").only(frozenset({"zebra", "a-dit"})).default.id == "zebra"


@pytest.mark.parametrize("gone", ["vae", "tokenizer_3", "text_encoder_2/config.json", "model_index.json"])
def test_a_users_card_without_all_of_its_files_is_not(models: Path, gone: str) -> None:
    path = mine(models) / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert opened(models).default.id == "emoji-mmdit"


def test_a_folder_without_the_built_in_model(models: Path) -> None:
    """Then what draws prompts and is here, then classes, and then what can be downloaded to draw prompts."""
    shutil.rmtree(models / "emoji-mmdit")
    assert opened(models).default.id == "sd3.5-medium"
    shutil.rmtree(models / "sd3.5-medium" / "transformer")
    assert opened(models).default.id == "a-dit"
    for name in ("a-dit", "emoji-dit"):
        shutil.rmtree(models / name / "transformer")
    assert opened(models).default.id == "sd3.5-medium"


def test_the_shipped_cards_are_those_that_come_with_the_project() -> None:
    folder = Path(__file__).parent.parent.parent / "models"
    assert frozenset(read_cards(folder)) == SHIPPED and BUILT_IN in SHIPPED
    assert opened(folder).default.id == BUILT_IN


@pytest.mark.parametrize(
    ("name", "words"), [("tiny-txt", '"tiny-text"'), ("../x", "there are"), ("x" * 9999, "there are")]
)
def test_an_unknown_name_is_answered_with_a_known_one(settings: Settings, name: str, words: str) -> None:
    with pytest.raises(ModelNotFound, match=words) as caught:
        Registry(read_cards(settings.models), settings).find(name)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 200


def test_only_some_models(settings: Settings) -> None:
    registry = Registry(read_cards(settings.models), settings)
    view = registry.only(frozenset({"tiny-label"}))
    assert list(view.cards) == ["tiny-label"]
    assert view.find(None) is view.find("tiny-label") is view.default
    for name in ("tiny-text", "gpt-image-1"):
        with pytest.raises(ModelNotFound, match=f'There is no model "{name}"') as caught:
            view.find(name)
        assert "tiny-text" not in caught.value.message.replace('no model "tiny-text"', "")
    with pytest.raises(ModelNotFound, match=r"there are tiny-label$"):
        view.find("other")
    assert registry.only(frozenset(registry.cards)).default is registry.default
    assert registry.find("gpt-image-1").id == "tiny-text"


def test_no_cards(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no cards in"):
        Registry({}, Settings(models=tmp_path))


def test_an_unknown_default(settings: Settings) -> None:
    with pytest.raises(SettingsError, match='default_model: no card is named "nope"'):
        Registry(read_cards(settings.models), settings.model_copy(update={"default_model": "nope"}))


def test_a_default_sampler_of_the_wrong_kind(tmp_path: Path) -> None:
    folder = write_cards(tmp_path / "models")
    (folder / "tiny-text" / "card.toml").write_text(TEXT.replace('"flow_euler"', '"ddim"'), encoding="utf-8")
    registry = Registry(read_cards(folder), Settings(models=folder))
    assert list(registry.all) == ["tiny-label"]
    (error,) = registry.all.skipped.values()
    assert re.search(r"tiny-text.card\.toml: defaults\.sampler.*flow_euler", error.message)
