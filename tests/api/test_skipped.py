"""Cards that cannot be served: the others are, and it is said of each of them why it is not among them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.errors import SettingsError, plain
from app.keys import read_keys, with_ids
from app.settings import Settings
from app.worker import plan
from tests.parts.cards import LABEL, TEXT, write_cards
from tests.parts.servers import ALICE, BOB, Server, bearer


def text(name: str, **other: str) -> str:
    """tiny-text's card under another name, with words of it replaced."""
    card = TEXT.replace("tiny-text", name).replace("gpt-image-1", name[::-1])
    for old, new in other.items():
        card = card.replace(old, new)
    return card


def part_of(owner: str) -> str:
    return f'components = {{ vae = "{owner}/vae" }}'


NO_PART = 'components.vae: "%s/vae" is not "<card id>/<folder>"; %s/card.toml: '
BAD = {
    "a-broken": ("id = 3", "id: Input should be a valid string"),
    "b-no-toml": ("id = ", "Invalid value"),
    "b-digits": (f'id = "b-digits"\nparameters = {"9" * 5000}', "Exceeds the limit"),
    os.fsdecode(b"b-not-utf-8-\xff"): ("id = 3", "id: Input should be a valid string"),
    "c-part": (text("c-part") + part_of("a-broken"), NO_PART % ("a-broken", "a-broken")),
    "d-of-c": (text("d-of-c") + part_of("c-part"), NO_PART % ("c-part", "c-part")),
    "e-sampler": (text("e-sampler", flow_euler="ddim"), 'defaults.sampler: "ddim" is not one of'),
    "f-of-e": (text("f-of-e") + part_of("e-sampler"), NO_PART % ("e-sampler", "e-sampler")),
    "tiny-text-2": (TEXT, "the name tiny-text is already used by tiny-text/card.toml"),
    "tiny-text-3": (
        TEXT.replace('"tiny-text"', '"tiny-text-3"'),
        "the name gpt-image-1 is already used by tiny-text/card.toml",
    ),
    "z-labels": (LABEL.replace("tiny-label", "z-labels"), "id2label: "),
    "z-long": (LABEL.replace("tiny-label", "z-long").replace('"."', f'"{"a" * 300}"'), "source: "),
}
"""Folder: its card.toml and what is said of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good cards, one of them with a broken index, and every bad one."""
    folder = write_cards(tmp_path_factory.mktemp("skipped") / "models")
    for name, (text, _) in BAD.items():
        (folder / name).mkdir()
        (folder / name / "card.toml").write_text(text, encoding="utf-8")
    (folder / "z-labels" / "model_index.json").write_text('{"id2label": {"3": "a"', encoding="utf-8")
    (folder / "tiny-text" / "model_index.json").write_text('{"vae": ["diffusers"', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def logged(folder: Path) -> Iterator[tuple[Server, list[Any]]]:
    """A started server with keys, and what it logged at its start."""
    lines: list[Any] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: lines.append(record.msg)  # type: ignore[method-assign]
    logging.getLogger("instep").addHandler(handler)
    file = folder.parent / "keys.toml"
    file.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["tiny-label"]\n', encoding="utf-8")
    keys = {"api_keys": f"alice={ALICE}", "api_keys_file": str(file)}
    server = Server(Settings(models=folder, devices="cpu", preload="tiny-label", port=0, drain=5, **keys))
    logging.getLogger("instep").removeHandler(handler)
    with server:
        yield server.ready(), lines


def test_the_others_are_served(logged: tuple[Server, list[Any]]) -> None:
    server, _ = logged
    body = {"model": "tiny-label", "class_label": 1}
    reply = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=bearer(ALICE), timeout=30)
    assert reply.status_code == 200, reply.text


def test_the_list_says_which_are_skipped_and_why(logged: tuple[Server, list[Any]], folder: Path) -> None:
    server, _ = logged
    told = httpx.get(f"{server.url}/v1/models", headers=bearer(ALICE)).json()
    assert {entry["id"] for entry in told["data"]} == {"tiny-label", "tiny-text"}
    skipped = {entry["card"]: entry["reason"] for entry in told["skipped"]}
    assert skipped.keys() == {plain(f"{name}/card.toml") for name in BAD}
    for name, reason in ((plain(name), reason) for name, (_, reason) in BAD.items()):
        found = skipped[f"{name}/card.toml"]
        assert found.startswith((f"{name}/card.toml: {reason}", f"{name}/model_index.json: {reason}")), found
    assert str(folder) not in str(told)


def test_a_broken_index_is_told_with_its_model(logged: tuple[Server, list[Any]], folder: Path) -> None:
    told = httpx.get(f"{logged[0].url}/v1/models/tiny-text", headers=bearer(ALICE)).json()
    assert told["state"] == "absent" and not told["downloaded"]
    assert told["detail"].startswith("tiny-text/model_index.json: not readable as JSON")


def test_a_key_of_some_models_sees_no_skipped_card(logged: tuple[Server, list[Any]]) -> None:
    told = httpx.get(f"{logged[0].url}/v1/models", headers=bearer(BOB)).json()
    assert [entry["id"] for entry in told["data"]] == ["tiny-label"] and told["skipped"] == []


def test_openais_client_lists_the_models(logged: tuple[Server, list[Any]]) -> None:
    with openai.OpenAI(base_url=f"{logged[0].url}/v1", api_key=ALICE) as client:
        assert {model.id for model in client.models.list()} == {"tiny-label", "tiny-text"}


def test_the_log_has_one_line_for_each(logged: tuple[Server, list[Any]], folder: Path) -> None:
    _, lines = logged
    skipped = [line["reason"] for line in lines if line["event"] == "card skipped"]
    assert len(skipped) == len(BAD) and all("\n" not in reason for reason in skipped)
    broken = [line for line in lines if line["event"] == "model cannot be loaded"]
    assert [line["model"] for line in broken] == ["tiny-label", "tiny-text"]  # neither has weights here


@pytest.mark.parametrize("name", ["a-broken", "c-part", "e-sampler", "tiny-text-3"])
def test_a_setting_that_names_a_skipped_card_says_why(folder: Path, tmp_path: Path, name: str) -> None:
    settings, reason = Settings(models=folder), BAD[name][1]
    registry = Registry(read_cards(folder), settings)
    with pytest.raises(SettingsError) as caught:
        Registry(read_cards(folder), settings.model_copy(update={"default_model": name}))
    assert f'default_model: no card is named "{name}"; ' in caught.value.message
    with pytest.raises(SettingsError) as caught:
        plan.preloads(settings.model_copy(update={"preload": name}), registry.all)
    assert f'no card is named "{name}"; ' in caught.value.message and reason[:20] in caught.value.message
    (tmp_path / "keys.toml").write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["{name}"]\n', encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        with_ids(read_keys(Settings(api_keys_file=str(tmp_path / "keys.toml"))), registry)
    assert reason[:20] in caught.value.message
    with pytest.raises(SettingsError) as caught:
        read_cards(folder, f"mine={name}")
    assert reason[:20] in caught.value.message


def test_a_folder_in_which_no_card_is_valid_says_why(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a-broken", tmp_path / "a-broken")
    with pytest.raises(SettingsError, match=r"no cards in .*: .*a-broken.card\.toml: id: "):
        Registry(read_cards(tmp_path), Settings(models=tmp_path))
