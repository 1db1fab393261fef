"""Cards: where class names come from, and that nothing but a CardError leaves a bad file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from app.cards.cards import read_card
from app.cards.catalog import find_label
from app.errors import CardError
from tests.parts.endless import make_endless
from tests.parts.tiny import DIT_CARD, SD3_CARD

REPO = 'source = { repo = "some/dit", revision = "main" }'


def write(folder: Path, *, source: str = 'source = { path = "." }', more: str = "") -> Path:
    """A DiT's card; `more` are lines at its top."""
    card = DIT_CARD.format(id="a", prediction="epsilon", components="").replace('source = { path = "." }', source)
    (folder / "card.toml").write_text(f"{more}\n{card}", encoding="utf-8")
    return folder / "card.toml"


def index(folder: Path, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(content), encoding="utf-8")


def snapshot(cache: Path) -> Path:
    """The folder of some/dit at main in the Hub's cache, as a download leaves it."""
    repo = cache / "models--some--dit"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    return repo / "snapshots" / "c0ffee"


def test_labels_are_in_order_of_id(tmp_path: Path) -> None:
    index(tmp_path, {"id2label": {str(number): f"name {number}" for number in sorted(range(12), key=str)}})
    assert read_card(write(tmp_path)).labels == tuple(f"name {number}" for number in range(12))


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"5": "cat", "9": "dog"}, "2 classes, but none has the id 0"),
        ({"0": "cat", "2": "dog"}, "2 classes, but none has the id 1"),
        ({"0": "cat", "01": "dog"}, "none has the id 1"),
        ({"zero": "cat"}, "none has the id 0"),
        ({"0": 7}, "not a text"),
        (["cat"], "list indices"),
        ("cat", "string indices"),
    ],
    ids=str,
)
def test_ids_are_zero_to_n_or_the_card_is_refused(tmp_path: Path, named: object, reason: str) -> None:
    index(tmp_path, {"id2label": named})
    with pytest.raises(CardError, match=rf"model_index\.json: id2label: .*{reason}"):
        read_card(write(tmp_path))


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    file = write(tmp_path)
    for content in (b"[" * 100_000, b"\xff", b"[]", b"{"):
        (tmp_path / "model_index.json").write_bytes(content)
        with pytest.raises(CardError, match=r"model_index\.json: id2label: "):
            read_card(file)
    (tmp_path / "model_index.json").write_text("{}")
    assert read_card(file).labels == ()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("pipe", "not a regular file"), ("device", "not a regular file"), ("terabyte", r"over \d+ bytes")],
)
def test_a_card_that_does_not_end_is_refused(tmp_path: Path, kind: str, reason: str) -> None:
    make_endless(write(tmp_path), kind)
    with pytest.raises(CardError, match=rf"card\.toml: .*{reason}"):
        read_card(tmp_path / "card.toml")


def test_an_index_that_does_not_end_is_refused(tmp_path: Path) -> None:
    index(tmp_path, {})
    make_endless(tmp_path / "model_index.json", "terabyte")
    with pytest.raises(CardError, match=r"model_index\.json: id2label: .*over \d+ bytes"):
        read_card(write(tmp_path))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_an_index_that_is_no_file_names_no_classes(tmp_path: Path, kind: str) -> None:
    """The load of the model says what is wrong; the start of the server goes on."""
    index(tmp_path, {})
    make_endless(tmp_path / "model_index.json", kind)
    assert read_card(write(tmp_path, more="classes = 2")).labels == ("class 0", "class 1")


def test_a_card_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "card.toml"
    for content in (b"a = " + b"[" * 100_000, b"\xff", b"a"):
        file.write_bytes(content)
        with pytest.raises(CardError, match=r"card\.toml: "):
            read_card(file)
    with pytest.raises(CardError):
        read_card(tmp_path / "nothing.toml")


def test_labels_of_a_hub_repository_come_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = write(tmp_path, source=REPO)
    assert read_card(file).labels == (), "not downloaded"
    index(snapshot(tmp_path / "hub"), {"id2label": {"1": "dog", "0": "cat"}})
    card = read_card(file)
    assert card.labels == ("cat", "dog") and find_label(card, "dog") == 1
    assert read_card(write(tmp_path, source='source = { repo = "no repository" }')).labels == ()
    index(tmp_path, {"id2label": {"0": "fish"}})
    assert read_card(write(tmp_path, source=REPO)).labels == ("cat", "dog"), (
        "what is downloaded goes before what is shipped"
    )


def test_classes_are_named_before_the_download_by_the_index_beside_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    index(tmp_path, {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}})
    card = read_card(write(tmp_path, source=REPO, more="classes = 2"))
    assert card.labels == ("tench, Tinca tinca", "goldfish") and find_label(card, "Tinca tinca") == 0
    with pytest.raises(CardError, match=r"classes: 3, but .*model_index\.json names 2"):
        read_card(write(tmp_path, source=REPO, more="classes = 3"))


def test_classes_without_names_are_asked_for_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    card = read_card(write(tmp_path, source=REPO, more="classes = 1000"))
    assert len(card.labels) == 1000
    assert [find_label(card, given) for given in (207, "207", "class 207")] == [207] * 3


def test_classes_that_do_not_agree(tmp_path: Path) -> None:
    index(tmp_path, {"id2label": {"0": "cat", "1": "dog"}})
    assert read_card(write(tmp_path, more="classes = 2")).labels == ("cat", "dog")
    with pytest.raises(CardError, match=r"classes: 3, but .*model_index\.json names 2"):
        read_card(write(tmp_path, more="classes = 3"))
    file = tmp_path / "card.toml"
    file.write_text("classes = 3\n" + SD3_CARD.format(id="b", components="", steps=4, guidance=4.0))
    with pytest.raises(CardError, match="classes: sd3 draws prompts"):
        read_card(file)
