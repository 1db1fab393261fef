"""A server with the real worker reads cards, keys, aliases and weights again while requests run; none of them fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.parts.servers import ADMIN, ALICE, BOB, INSTEP, Process, bearer
from tests.parts.tiny import write_dit
from tests.parts.waiting import eventually

pytestmark = pytest.mark.slow

LONG = {"model": "tiny-dit", "class_label": 3, "seed": 5, "n": 4, "num_inference_steps": 250}
SHORT = {"model": "tiny-dit", "class_label": 3, "seed": 5, "num_inference_steps": 8}
PATH = "/v1/images/generations"
CAROL = "sk-carol-1112223334"


class Stand:
    """A server process on a folder of tiny models of its own, and who asks it all the time."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.models, self.keys, self.config = folder / "models", folder / "keys.toml", folder / "instep.toml"
        self.tiny = tiny
        for name in ("tiny-dit", "tiny-sd3"):
            shutil.copytree(tiny / name, self.models / name)
        self.grant(alice=ALICE, bob=BOB)
        self.set(alias="painter=tiny-sd3")
        words = (
            "serve",
            "--devices",
            "cpu",
            "--dtype",
            "float32",
            "--deterministic",
            "--port",
            "0",
            "--preload",
            "all",
        )
        command = (*INSTEP, *words, "--models", str(self.models), "--config", str(self.config))
        environment = {"INSTEP_ADMIN_KEY": ADMIN, "INSTEP_API_KEYS_FILE": str(self.keys)}
        self.process = Process(command, **environment, XDG_CACHE_HOME=str(folder), INSTEP_CACHE=str(folder))
        self.replies: list[httpx.Response] = []
        self._asking = True

    def grant(self, **keys: str) -> None:
        text = "".join(f'[keys.{name}]\nkey = "{key}"\n' for name, key in keys.items())
        self.keys.write_text(text, encoding="utf-8")

    def set(self, **settings: str) -> None:
        self.config.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()), encoding="utf-8")

    def edit(self, model: str, old: str, new: str) -> None:
        file = self.models / model / "card.toml"
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in list(self.process.lines) if line.startswith("{"))
        return [line for line in lines if line["event"] == event]

    def hang_up(self) -> dict[str, Any]:
        """Send SIGHUP; returns the line of that reload, once somebody was answered after it."""
        before = len(self.logged("reloaded"))
        self.process.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(self.logged("reloaded")) > before)
        answered = len(self.replies)
        eventually(lambda: len(self.replies) > answered)
        return self.logged("reloaded")[-1]

    def reload(self) -> dict[str, Any]:
        reply = httpx.post(f"{self.process.url}/v1/reload", headers=bearer(ADMIN), timeout=60)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def draw(self, body: dict[str, Any], key: str = ALICE) -> httpx.Response:
        return httpx.post(self.process.url + PATH, json=body, headers=bearer(key), timeout=100)

    def pictures(self, body: dict[str, Any]) -> list[str]:
        reply = self.draw(body)
        assert reply.status_code == 200, reply.text
        return [one["b64_json"] for one in reply.json()["data"]]

    def ask_on(self, body: dict[str, Any]) -> threading.Thread:
        """Ask for the same again and again, until the end."""

        def ask() -> None:
            while self._asking:
                self.replies.append(self.draw(body))

        return self.start(ask)

    def start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def begin(self, body: dict[str, Any], key: str = ALICE) -> Callable[[], httpx.Response]:
        """Ask, and wait until it is drawn; returns how to wait for the reply."""
        replies: list[httpx.Response] = []
        thread = self.start(lambda: replies.append(self.draw(body, key)))
        eventually(lambda: httpx.get(f"{self.process.url}/health", headers=bearer(ALICE)).json()["running"] > 0)

        def reply() -> httpx.Response:
            thread.join(100)
            return replies[0]

        assert thread.is_alive()
        return reply

    def end(self, *threads: threading.Thread) -> None:
        self._asking = False
        for thread in threads:
            thread.join(100)


@pytest.fixture
def stand(tiny: Path, tmp_path: Path) -> Iterator[Stand]:
    stand = Stand(tiny, tmp_path)
    with stand.process:
        stand.process.wait_ready()
        yield stand
        stand.end()


def test_everything_is_reloaded_under_requests_and_none_fails(stand: Stand) -> None:
    asking = [
        stand.ask_on({"model": "tiny-dit", "class_label": 1, "n": 2}),
        stand.ask_on({"model": "tiny-sd3", "prompt": "a", "num_inference_steps": 20}),
        stand.ask_on({"model": "tiny-sd3", "prompt": "b", "stream": True}),
    ]
    get = httpx.Client(base_url=stand.process.url, headers=bearer(ALICE), timeout=60).get

    shutil.copytree(stand.tiny / "tiny-sd3-turbo", stand.models / "turbo")
    assert stand.hang_up()["added"] == ["tiny-sd3-turbo"]
    assert stand.draw({"model": "tiny-sd3-turbo", "prompt": "c"}).status_code == 200

    stand.edit("tiny-dit", "num_inference_steps = 8", "num_inference_steps = 5")
    assert stand.hang_up()["changed"] == ["tiny-dit"]
    assert get("/v1/models/tiny-dit").json()["defaults"]["num_inference_steps"] == 5

    stand.edit("tiny-dit", 'family = "dit"', 'family = "none"')
    stand.hang_up()
    (problem,) = stand.logged("not reloaded")
    assert problem["file"].endswith("tiny-dit/card.toml") and problem["reason"].startswith("family: ")
    assert get("/v1/models/tiny-dit").json()["defaults"]["num_inference_steps"] == 5
    assert [one["card"] for one in get("/v1/models").json()["skipped"]] == ["tiny-dit/card.toml"]
    stand.edit("tiny-dit", 'family = "none"', 'family = "dit"')

    shutil.rmtree(stand.models / "turbo")
    assert stand.hang_up()["removed"] == ["tiny-sd3-turbo"]
    assert stand.draw({"model": "tiny-sd3-turbo", "prompt": "c"}).status_code == 404

    stand.set(alias="painter=tiny-dit", log_level="debug", default_model="tiny-dit")
    assert stand.hang_up()["settings"] == ["alias", "default_model", "log_level"]
    assert get("/v1/models/painter").json()["id"] == "tiny-dit" and get("/healthz").status_code == 200
    eventually(lambda: [line for line in stand.logged("request") if line["path"] == "/healthz"])
    assert stand.draw({"class_label": 1}).headers["content-type"] == "application/json"

    stand.end(*asking)
    assert {reply.status_code for reply in stand.replies} == {200}, [one.text for one in stand.replies]
    assert all("event: error" not in one.text for one in stand.replies)
    stand.process.stop()


def test_a_key_that_is_revoked_finishes_what_it_began(stand: Stand) -> None:
    drawn = stand.begin(LONG, BOB)
    stand.grant(alice=ALICE, carol=CAROL)
    assert stand.reload() == {
        "added": [], "changed": [], "removed": [], "keys": True, "loras": [], "settings": [], "problems": [],
    }  # fmt: skip
    assert stand.draw(SHORT, BOB).status_code == 401
    assert stand.draw(SHORT, CAROL).status_code == 200
    assert drawn().status_code == 200


def test_new_weights_draw_what_comes_later_and_old_ones_what_was_there(stand: Stand, tmp_path: Path) -> None:
    long, short = stand.pictures(LONG), stand.pictures(SHORT)
    old, new = stand.models / "tiny-dit", tmp_path / "new"
    write_dit(new, seed=77)
    drawn = stand.begin(LONG)
    os.rename(old, tmp_path / "old")
    os.rename(new, old)
    assert stand.reload()["problems"] == []
    later = stand.begin(SHORT)
    assert [one["b64_json"] for one in drawn().json()["data"]] == long
    assert [one["b64_json"] for one in later().json()["data"]] != short
    os.rename(old, tmp_path / "new")
    os.rename(tmp_path / "old", old)
    stand.reload()
    assert stand.pictures(SHORT) == short


def test_a_changed_card_draws_what_comes_later(stand: Stand) -> None:
    """The prediction is what the network's output is taken for: another picture from the same weights."""
    long, short = stand.pictures(LONG), stand.pictures(SHORT)
    drawn = stand.begin(LONG)
    stand.edit("tiny-dit", 'prediction = "epsilon"', 'prediction = "v"')
    assert stand.reload()["changed"] == ["tiny-dit"]
    later = stand.begin(SHORT)
    assert [one["b64_json"] for one in drawn().json()["data"]] == long
    assert [one["b64_json"] for one in later().json()["data"]] != short
