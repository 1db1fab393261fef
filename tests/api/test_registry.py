"""Models by id, alias and default; what makes a folder of cards unfit to start with."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.api.registry import Registry
from app.card import read_cards
from app.errors import CardError, ModelNotFound, SettingsError
from app.settings import Settings
from tests.api.conftest import TEXT, write_cards


def test_by_id_alias_and_default(settings: Settings) -> None:
    registry = Registry(read_cards(settings.models), settings)
    assert registry.find("tiny-label").id == "tiny-label"
    assert registry.find("gpt-image-1").id == "tiny-text"
    assert registry.find(None) is registry.find("") is registry.default
    assert registry.default.id == "tiny-text"
    assert registry.names(registry.default) == ("tiny-text", "gpt-image-1")


def test_without_a_setting_the_first_card_is_the_default(settings: Settings) -> None:
    first = settings.model_copy(update={"default_model": ""})
    assert Registry(read_cards(settings.models), first).default.id == "tiny-label"


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
    with pytest.raises(CardError, match=r"tiny-text.card\.toml: defaults\.sampler.*flow_euler"):
        Registry(read_cards(folder), Settings(models=folder))
