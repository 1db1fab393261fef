"""What is printed as curl is what was drawn, and files are named and checked before anything is drawn."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from app.cards.catalog import Registry
from app.cli.bodies import build, curl, file_name, kind_of, open_registry
from app.errors import InvalidValue
from app.jobs.body import read_body
from app.settings import Settings


@pytest.fixture
def registry(tiny: Path) -> Registry:
    return open_registry(Settings(models=tiny, default_model="tiny-sd3"))


BODIES: list[dict[str, Any]] = [
    {"prompt": 'it\'s a "red" $HOME & `cat`', "model": "tiny-sd3", "size": "32x16", "negative_prompt": "blue"},
    {"class_label": "green", "model": "tiny-dit", "seed": 5, "sampler": "heun", "num_inference_steps": 3},
    {"prompt": "a", "model": "tiny-sd3-turbo", "n": 3, "guidance_scale": 2.5},
]


@pytest.mark.parametrize("body", BODIES)
def test_the_curl_asks_for_the_same(registry: Registry, body: dict[str, Any]) -> None:
    ask = build(body, registry, "a")
    words = shlex.split(curl(ask, Settings(port=81), Path("my file.png")))
    assert words[:2] == ["curl", "localhost:81/v1/images/generations"] and words[-2:] == ["-o", "my file.png"]
    told = json.loads(words[words.index("-d") + 1])
    again = read_body(told).to_request(registry.find(told["model"]), "a")
    assert (again.recipe, again.images) == (ask.request.recipe, ask.request.images)
    assert ("grid" in told) == (body.get("n", 1) > 1)


def test_nothing_given_is_given_to_the_curl(registry: Registry) -> None:
    ask = build({"prompt": "a", "model": None, "size": None, "seed": 1}, registry, "a")
    words = shlex.split(curl(ask, Settings(host="::1"), Path("a.webp")))
    assert json.loads(words[words.index("-d") + 1]) == {"model": registry.default.id, "prompt": "a", "seed": 1}
    assert words[1] == "[::1]:8000/v1/images/generations"


def test_files_are_named_after_what_they_show(registry: Registry) -> None:
    names = [file_name(build({**body, "seed": 7}, registry, "a")).name for body in BODIES]
    assert names == ["it-s-a-red-home-cat-7.png", "green-7.png", "a-7.png"]
    assert file_name(build({"prompt": "../..", "seed": 7, "model": "tiny-sd3"}, registry, "a")) == Path(
        "tiny-sd3-7.png"
    )


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    assert [kind_of(tmp_path / name) for name in ("a.png", "b.JPG", "c.webp")] == [None, "jpeg", "webp"]
    with pytest.raises(InvalidValue, match="must end in"):
        kind_of(tmp_path / "a.gif")
    with pytest.raises(InvalidValue, match="there is no folder"):
        kind_of(tmp_path / "no" / "a.png")
