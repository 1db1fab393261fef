"""Cards with a base: what they have of it, what is refused, and that no engine knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cards.cards import Cards, read_cards
from app.cards.catalog import Registry, faults, read_again
from app.cards.folder import ModelFolder
from app.settings import Settings
from app.worker.plan import preloads
from tests.parts.cards import adapter, write_cards

INK = 'id = "a-ink"\nbase = "tiny-text"\nloras = [{ name = "ink", weight = 0.5 }, { name = "wash" }]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_cards(tmp_path / "models")


def put(folder: Path, text: str, name: str = "a-ink") -> Cards:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "card.toml").write_text(text, encoding="utf-8")
    return read_cards(folder)


def test_it_has_its_own_words_and_all_else_of_its_base(folder: Path) -> None:
    own = 'aliases = ["inky"]\ndescription = "ink"\ndefaults = { num_inference_steps = 9 }\nlimits = { n = 2 }\n'
    cards = put(folder, INK + own)
    card, base = cards["a-ink"], cards["tiny-text"]
    assert (card.names, card.description, card.model, base.model) == (
        ("a-ink", "inky"),
        "ink",
        "tiny-text",
        "tiny-text",
    )
    assert [(one.name, one.weight) for one in card.loras] == [("ink", 0.5), ("wash", 1.0)]
    assert card.defaults == base.defaults.model_copy(update={"num_inference_steps": 9})
    assert card.limits == base.limits.model_copy(update={"n": 2})
    others = {"id", "base", "loras", "aliases", "description", "defaults", "limits", "folder"}
    assert card.model_dump(exclude=others) == base.model_dump(exclude=others)
    assert card.file == (folder / "a-ink" / "card.toml").resolve()


def test_a_variant_of_classes_has_the_names_of_its_base(folder: Path) -> None:
    cards = put(folder, 'id = "a-ink"\nbase = "tiny-label"\n')
    assert cards["a-ink"].labels == cards["tiny-label"].labels != ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (INK.replace("tiny-text", "tiny"), 'base: no card with weights of its own has the id "tiny"'),
        (INK.replace("tiny-text", "b-ink"), 'base: no card with weights of its own has the id "b-ink"'),
        (INK.replace("tiny-text", "a-ink"), 'base: no card with weights of its own has the id "a-ink"'),
        (INK.replace("tiny-text", "gpt-image-1"), "base: no card with weights of its own has the id"),
        (INK.replace('id = "a-ink"', ""), "id: a card with a base has another one than that"),
        (INK.replace('"a-ink"', '"tiny-text"'), "id: a card with a base has another one than that"),
        (INK + 'family = "sd3"\n', "family: a card with a base has that of its base"),
        (INK + "adapters = {}\n", "adapters: unknown field"),
        (INK + "limits = { n = 0 }\n", "limits.n: "),
        (INK + "defaults = 1\n", "defaults: "),
        (INK.replace("0.5", "2.5"), "loras.0.weight: expects a number from -2 to 2"),
        (INK.replace('{ name = "wash" }', "1"), "loras.1: "),
        ('id = "a-ink"\nloras = []\n', "base: no card with weights of its own has the id"),
    ],
)
def test_what_is_wrong_is_skipped_by_name(folder: Path, text: str, said: str) -> None:
    put(folder, INK.replace("a-ink", "b-ink"), "b-ink")
    cards = put(folder, text)
    (error,) = cards.skipped.values()
    assert error.message.startswith(f"{folder / 'a-ink' / 'card.toml'}: {said}")
    assert set(cards) == {"tiny-text", "tiny-label", "b-ink"}


def test_without_its_base_it_is_skipped_too(folder: Path) -> None:
    put(folder, INK)
    file = folder / "tiny-text" / "card.toml"
    file.write_text('components = { vae = "nothing/vae" }\n' + file.read_text(encoding="utf-8"), encoding="utf-8")
    cards = read_cards(folder)
    assert set(cards) == {"tiny-label"}
    message = cards.skipped[folder / "a-ink" / "card.toml"].message
    assert "components.vae" in message or "base: tiny-text is gone; " in message


def test_engines_and_the_default_do_not_know_it(folder: Path) -> None:
    cards, settings = put(folder, INK), Settings(models=folder, preload="a-ink,tiny-text")
    assert set(cards.models) == {"tiny-text", "tiny-label"} and preloads(settings, cards) == ["tiny-text"]
    registry = Registry(cards, settings)
    assert registry.default.id == "tiny-text" and registry.find("a-ink").base == "tiny-text"
    assert registry.adapters is None, "a variant has LoRAs, of which nothing is known yet"
    named = settings.model_copy(update={"default_model": "a-ink"})
    assert Registry(cards, named).default.id == "a-ink"
    with_files = ModelFolder(cards["a-ink"], cards)
    assert with_files.path == cards["tiny-text"].folder


def test_a_changed_base_changes_it(folder: Path) -> None:
    settings, cards = Settings(models=folder), put(folder, INK)
    file = folder / "tiny-text" / "card.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("guidance_scale = 3.0", "guidance_scale = 2.0"))
    again = read_again(settings, cards)
    assert again["a-ink"].defaults.guidance_scale == again["tiny-text"].defaults.guidance_scale == 2.0


def test_what_it_lacks_is_a_fault(folder: Path) -> None:
    settings, cards = Settings(models=folder), put(folder, INK)
    ink, wash = adapter("ink", "tiny-text"), adapter("wash", "tiny-label")

    def told(*found: object) -> list[str]:
        return [why for _, why in faults(Registry(cards, settings, {one.name: one for one in found}))]  # type: ignore[attr-defined]

    assert told(ink, wash) == ["model: wash does not fit a-ink; it fits tiny-label"]
    assert told(wash) == ['model: there is no LoRA "ink"; a-ink takes none of those here']
    assert told(ink, adapter("wash", "tiny-text")) == []
    twice = put(folder, INK.replace("wash", "ink"))
    (why,) = [why for _, why in faults(Registry(twice, settings, {"ink": ink}))]
    assert why == "model: ink is named twice"


def test_the_view_of_a_key_has_its_models_and_loras_alone(folder: Path) -> None:
    settings, cards = Settings(models=folder), put(folder, INK)
    both, ink, other = (
        adapter("both", "tiny-text", "tiny-label"),
        adapter("ink", "tiny-text"),
        adapter("x", "tiny-label"),
    )
    registry = Registry(cards, settings, {one.name: one for one in (both, ink, other)})
    view = registry.only(frozenset({"tiny-label"}))
    assert {name: set(one.fits) for name, one in (view.adapters or {}).items()} == {
        "both": {"tiny-label"},
        "x": {"tiny-label"},
    }
    assert set(registry.only(frozenset(), frozenset({"ink", "gone"})).adapters or {}) == {"ink"}
    assert set(registry.only(frozenset({"a-ink"})).adapters or {}) == {"both", "ink"}
    assert registry.only(frozenset({"a-ink"})) is registry.only(frozenset({"a-ink"}))
