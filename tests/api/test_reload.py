"""POST /v1/reload on a server with the fake worker: what it reads again, what it reports, and what stays."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api import models
from app.api.front import Front
from app.cards.folder import ModelFolder
from app.cli.options import read_settings
from app.keys import Keyring
from tests.parts.cards import write_cards
from tests.parts.servers import ADMIN, ALICE, BOB, Server, bearer
from tests.parts.tiny import write_dit
from tests.parts.waiting import eventually

NOTHING = {"added": [], "changed": [], "removed": [], "keys": False, "loras": [], "settings": [], "problems": []}


class Stand:
    """A server with files of its own. flags: of the command line, which go before the file."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.folder = folder
        self.models, self.keys, self.config = folder / "models", folder / "keys.toml", folder / "i.toml"
        self.write()
        files = {"models": self.models, "api_keys_file": self.keys, "config": self.config}
        facts = {"port": 0, "drain": 5, **{name: str(file) for name, file in files.items()}}
        flags = {**facts, "devices": "cpu", "preload": "all", **flags}
        self.server = Server(read_settings(**flags, admin_key=ADMIN), reread=lambda: read_settings(**flags))

    def write(self) -> None:
        """The files as they are at the start."""
        write_cards(self.models)
        self.grant(alice=f'key = "{ALICE}"', bob=f'key = "{BOB}"\nmodels = ["tiny-label"]')
        self.set('alias = "painter=tiny-text"')
        self.prepare()

    def prepare(self) -> None:
        """Write more files before the server is made."""

    def grant(self, **entries: str) -> None:
        text = "".join(f"[keys.{name}]\n{entry}\n" for name, entry in entries.items())
        self.keys.write_text(text, encoding="utf-8")

    def set(self, *lines: str) -> None:
        self.config.write_text("\n".join(lines), encoding="utf-8")

    def edit(self, name: str, old: str, new: str) -> None:
        file = self.models / name / "card.toml"
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")

    def reload(self) -> dict[str, Any]:
        reply = httpx.post(f"{self.server.url}/v1/reload", headers=bearer(ADMIN))
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def get(self, path: str, key: str = ALICE) -> httpx.Response:
        return httpx.get(self.server.url + path, headers=bearer(key))

    def models_less_time(self) -> list[dict[str, Any]]:
        return [{**model, "created": 0} for model in self.get("/v1/models").json()["data"]]

    def names(self, key: str = ALICE) -> list[str]:
        return [model["id"] for model in self.get("/v1/models", key).json()["data"]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    stand, level = Stand(tmp_path_factory.mktemp("stand")), logging.getLogger().level
    with stand.server:
        stand.server.ready()
        yield stand
    logging.getLogger().setLevel(level)


@pytest.fixture
def stand(served: Stand) -> Iterator[Stand]:
    """One server for all tests, which each finds as it was at its start."""
    before = served.models_less_time()
    assert served.names(BOB) == ["tiny-label"]
    yield served
    shutil.rmtree(served.folder)
    served.write()
    assert served.reload()["problems"] == []
    served.server.ready()
    assert served.models_less_time() == before


def test_without_a_change_nothing_changes(stand: Stand) -> None:
    assert stand.reload() == NOTHING


def test_a_new_card_is_served_and_documented(stand: Stand) -> None:
    before = stand.get("/openapi.json").text
    shutil.copytree(stand.models / "tiny-label", stand.models / "more")
    stand.edit("more", '"tiny-label"', '"more"')
    assert stand.reload() == NOTHING | {"added": ["more"]}
    reply = httpx.post(
        f"{stand.server.url}/v1/images/generations", json={"model": "more", "class_label": 1}, headers=bearer(ALICE)
    )
    assert reply.status_code == 200 and "more" in stand.names() and "more" not in stand.names(BOB)
    assert "ImageBody.more" in stand.get("/openapi.json").text and "ImageBody.more" not in before


def test_a_card_that_is_gone_is_no_model_any_more(stand: Stand) -> None:
    assert "tiny-text" in stand.get("/metrics").text
    shutil.rmtree(stand.models / "tiny-text")
    stand.set()
    assert stand.reload() == NOTHING | {"removed": ["tiny-text"], "settings": ["alias"]}
    assert stand.names() == ["tiny-label"] and stand.get("/v1/models/tiny-text").status_code == 404
    assert stand.get("/readyz").status_code == 200, "what PRELOAD named and is gone is waited for no more"
    gauges = re.findall(r'^instep_(?:model_loaded|num_requests_\w+){model="([\w-]+)"', stand.get("/metrics").text, re.M)
    assert set(gauges) == {"tiny-label"}


@pytest.mark.parametrize("name", ["tiny-text", "tiny-label"])
def test_a_card_that_is_broken_stays_as_it_was(stand: Stand, name: str) -> None:
    before = stand.models_less_time()
    stand.edit(name, "num_inference_steps = 4", "num_inference_steps = 0")
    reply = stand.reload()
    (problem,) = reply.pop("problems")
    assert problem["file"] == str(stand.models / name / "card.toml")
    assert problem["reason"].startswith("defaults.num_inference_steps: ") and reply.items() <= NOTHING.items()
    assert stand.models_less_time() == before
    stand.edit(name, "num_inference_steps = 0", "num_inference_steps = 3")
    assert stand.reload() == NOTHING | {"changed": [name]}
    assert stand.get(f"/v1/models/{name}").json()["defaults"]["num_inference_steps"] == 3


def test_an_alias_a_default_and_a_level_come_from_the_file(stand: Stand) -> None:
    stand.set('alias = "painter=tiny-label"', 'default_model = "tiny-label"', 'log_level = "warning"')
    found = stand.reload()
    assert found == NOTHING | {
        "changed": ["tiny-label", "tiny-text"],
        "settings": ["alias", "default_model", "log_level"],
    }
    assert stand.get("/v1/models/painter").json()["id"] == "tiny-label" and stand.names()[0] == "tiny-label"


def test_a_flag_goes_before_the_file(tmp_path: Path) -> None:
    stand = Stand(tmp_path, alias="mine=tiny-label")
    with stand.server:
        stand.set('alias = "other=tiny-text"')
        assert stand.reload() == NOTHING
        assert stand.get("/v1/models/mine").status_code == 200 and stand.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("max_wait = 7", "max_wait: the new value takes a restart"),
        ("nonsense = 7", "nonsense: no setting of this file"),
        (f'admin_key = "{ADMIN}"', "admin_key: no setting of this file"),
        ("alias = ", "Invalid value"),
        (f"{ALICE} = 7", "...: no setting of this file"),
        ("deep = " + 9_000 * "[", "maximum recursion depth"),
        ('log_level = "loud"', "--log-level (INSTEP_LOG_LEVEL): Input should be 'debug'"),
    ],
)
def test_what_the_file_may_not_change_is_reported(stand: Stand, line: str, reason: str) -> None:
    stand.set('alias = "painter=tiny-text"', line)
    found = stand.reload()
    (problem,) = found.pop("problems")
    assert reason in problem["reason"] and problem["file"] == str(stand.config) and found.items() <= NOTHING.items()
    assert stand.server.supervisor.max_wait == 120 and stand.get("/v1/models/painter").status_code == 200


@pytest.mark.parametrize("setting", ["default_model", "alias"])
def test_a_setting_with_an_unknown_model_keeps_the_cards(stand: Stand, setting: str) -> None:
    stand.set('alias = "b=nope"' if setting == "alias" else 'default_model = "nope"', 'log_level = "error"')
    shutil.rmtree(stand.models / "tiny-text")
    found = stand.reload()
    (problem,) = found.pop("problems")
    assert problem["reason"].startswith(setting) and "nope" in problem["reason"]
    assert found["settings"] == ["log_level"] and stand.get("/v1/models/painter").json()["id"] == "tiny-text"


def test_an_empty_folder_keeps_the_cards(stand: Stand) -> None:
    os.rename(stand.models, stand.models.with_name("away"))
    assert len(stand.reload()["problems"]) == 1 and len(stand.names()) == 2


@pytest.fixture
def plain(stand: Stand) -> Stand:
    """Without a key or an alias that needs a model."""
    stand.set()
    stand.grant(alice=f'key = "{ALICE}"')
    stand.reload()
    return stand


@pytest.mark.parametrize(
    ("old", "new"),
    [('"tiny-label"', '"tiny-text"'), ("\nfamily", '\naliases = ["gpt-image-1"]\nfamily')],
    ids=["id", "alias"],
)
def test_a_card_cannot_take_the_name_of_another(plain: Stand, old: str, new: str) -> None:
    """Its folder comes first, so at a start the name would be its own."""
    before = plain.models_less_time()
    plain.edit("tiny-label", old, new)
    reply = plain.reload()
    (problem,) = reply.pop("problems")
    assert "is already used by" in problem["reason"] and reply.items() <= NOTHING.items()
    assert plain.models_less_time() == before


def test_a_link_to_a_folder_with_a_broken_card_keeps_the_model(plain: Stand, tmp_path: Path) -> None:
    for name in ("v1", "v2"):
        shutil.copytree(plain.models / "tiny-text", tmp_path / name)
    (tmp_path / "v2" / "card.toml").write_text("id = 7", encoding="utf-8")
    shutil.rmtree(plain.models / "tiny-text")
    link = plain.models / "tiny-text"
    link.symlink_to(tmp_path / "v1")
    assert plain.reload() == NOTHING | {"changed": ["tiny-text"]}
    link.unlink()
    link.symlink_to(tmp_path / "v2")
    assert [problem["file"] for problem in plain.reload()["problems"]] == [str(link / "card.toml")]
    assert len(plain.names()) == 2


@pytest.mark.parametrize("link", ["tiny-text/card.toml", "tiny-text"])
def test_a_card_behind_a_broken_link_stays_as_it_was(plain: Stand, link: str) -> None:
    os.rename(plain.models / "tiny-text", plain.models.with_name("away"))
    (plain.models / link).parent.mkdir(exist_ok=True)
    (plain.models / link).symlink_to(plain.models / link)
    card = plain.models / "tiny-text" / "card.toml"
    assert [problem["file"] for problem in plain.reload()["problems"]] == [str(card)]
    assert len(plain.names()) == 2


def test_a_card_whose_files_are_gone_stays_as_it_was(plain: Stand, tmp_path: Path) -> None:
    """Where the files of the old one are here."""
    write_dit(plain.models / "tiny-dit")
    assert plain.reload() == NOTHING | {"added": ["tiny-dit"]}
    plain.edit("tiny-dit", "source = ", 'description = "new"\nsource = ')
    plain.edit("tiny-dit", 'path = "."', 'path = "nowhere"')
    (problem,) = plain.reload()["problems"]
    assert problem["file"].endswith("tiny-dit/card.toml") and "nowhere does not exist" in problem["reason"]
    assert plain.get("/v1/models/tiny-dit").json()["downloaded"]


def test_a_list_of_models_is_not_older_than_the_reload(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lists are under way, of which the second waits for the first; the third must not share the second."""
    shared, go, asked = Front.shared, threading.Event(), 0

    async def counted(front: Front, key: Any, make: Any) -> Any:
        nonlocal asked
        asked += key != "reload"
        return await shared(front, key, make)

    class Slow(ModelFolder):
        def fault(self) -> None:
            assert go.wait(20)

    monkeypatch.setattr(Front, "shared", counted)
    monkeypatch.setattr(models, "ModelFolder", Slow)
    with ThreadPoolExecutor(3) as pool:
        for number in (1, 2, 3):
            if number == 3:
                stand.set('alias = "other=tiny-text"')
                assert stand.reload()["settings"] == ["alias"]
            last = pool.submit(stand.get, "/v1/models")
            eventually(lambda number=number: asked == number)
        go.set()
        assert any("other" in model["aliases"] for model in last.result().json()["data"])


def test_keys_of_the_file_come_and_go(stand: Stand) -> None:
    carol = "sk-carol-1112223334"
    stand.grant(alice=f'key = "{ALICE}"', carol=f'key = "{carol}"')
    assert stand.reload() == NOTHING | {"keys": True}
    assert stand.get("/v1/models", BOB).status_code == 401 and stand.get("/v1/models", carol).status_code == 200


@pytest.mark.parametrize(
    "entries", [{}, {"alice": 'key = "short"'}, {"alice": f'key = "{ALICE}"\nmodels = ["nope"]'}], ids=str
)
def test_a_broken_file_keeps_all_keys(stand: Stand, entries: dict[str, str]) -> None:
    stand.grant(**entries)
    found = stand.reload()
    (problem,) = found.pop("problems")
    assert problem["file"] == str(stand.keys) and found.items() <= NOTHING.items()
    assert "short" not in problem["reason"]
    assert stand.get("/v1/models").status_code == stand.get("/v1/models", BOB).status_code == 200


def test_a_model_stays_as_long_as_a_key_names_it(stand: Stand) -> None:
    shutil.rmtree(stand.models / "tiny-label")
    reasons = [problem["reason"] for problem in stand.reload()["problems"]]
    assert reasons and all(reason.startswith("keys.bob.models: ") for reason in reasons)
    assert stand.names(BOB) == ["tiny-label"]
    stand.grant(alice=f'key = "{ALICE}"')
    assert stand.reload() == NOTHING | {"removed": ["tiny-label"], "keys": True}


def test_keys_of_the_environment_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_API_KEYS", f"dora={ALICE[::-1]}")
    stand = Stand(tmp_path)
    monkeypatch.delenv("INSTEP_API_KEYS")
    with stand.server:
        stand.grant(alice=f'key = "{ALICE}"')
        assert stand.reload()["keys"] is True
        assert stand.get("/v1/models", ALICE[::-1]).status_code == 200
        front: Any = stand.server.app.state.front
        assert isinstance(front.keys, Keyring) and [key.name for key in front.keys.clients] == ["dora", "alice"]


def test_reloads_do_not_run_at_once(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, runs = 0, 0, 0
    front: Any = stand.server.app.state.front
    reread = front.reread

    def slow() -> Any:
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        try:
            return reread()
        finally:
            running -= 1

    object.__setattr__(front, "reread", slow)
    try:
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda _: stand.reload(), range(32))) == [NOTHING] * 32
    finally:
        object.__setattr__(front, "reread", reread)
    assert most == 1 <= runs <= 32
