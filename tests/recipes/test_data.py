"""Subjects, scenes and captions of the list that is in the repository; the drawings are not."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import (
    COLOURS,
    PACKAGES,
    PLACES,
    SIZE,
    STYLES,
    Subject,
    article,
    caption,
    code,
    draw_scene,
    every_plain_scene,
    label,
    load_subjects,
    names,
    render,
    shown,
    trained,
)

from tests.recipes.conftest import drawing

FIRST_TRIED = """apple, cat, dog, frog, otter, pizza, tiger, avocado, octopus, hot dog, snail, banana, penguin,
mushroom, lion, heart, rocket, robot, house, car, tree, sun, snowman, umbrella""".replace("\n", " ").split(", ")


@cache
def listed() -> list[Subject]:
    drawings = (drawing(1), drawing(2))
    return [Subject(key, said, drawings) for key, said in names().items()]


def test_what_people_try_first_is_a_subject_and_no_name_is_used_twice() -> None:
    said = Counter(name for each in names().values() for name in each)
    assert 280 <= len(names()) <= 320
    assert set(FIRST_TRIED) <= set(said)
    assert [name for name, count in said.items() if count > 1 or name != name.strip().lower()] == []
    assert sum("face" in each[0] for each in names().values()) <= 10


def test_one_pair_in_ten_is_never_trained() -> None:
    subjects = listed()
    kept = [(s, c) for s in subjects for c in COLOURS if not trained(s, c)]
    assert 0.09 < len(kept) / len(subjects) / len(COLOURS) < 0.11
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, subjects) for _ in range(5000)]
    assert all(trained(subjects[each.subject], each.colour) for each in scenes)
    every = [draw_scene(rng, subjects, every_pair=True) for _ in range(5000)]
    assert sum(not trained(subjects[each.subject], each.colour) for each in every) > 300


def test_a_style_that_is_not_named_is_the_first() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, listed()) for _ in range(2000)]
    assert all(each.style_named for each in scenes if each.drawing)
    assert 0.4 < sum(not each.style_named for each in scenes) / 2000 < 0.5
    assert 0.35 < sum(each.drawing for each in scenes) / 2000 < 0.45


def test_a_subject_has_at_least_76_plain_scenes_and_each_is_another_picture() -> None:
    subject = listed()[0]
    pictures = {render(scene, subject).tobytes() for scene in every_plain_scene(0)[0]}
    assert len(pictures) >= 76 and {len(each) for each in pictures} == {SIZE * SIZE * 3}


def test_a_caption_says_what_the_scene_names_and_nothing_else() -> None:
    subjects, rng = listed(), np.random.default_rng(0)
    words = {"colour": set(COLOURS), "place": set(PLACES), "style": set(STYLES), "size": {"small", "tiny", "little"}}
    for _ in range(3000):
        scene = draw_scene(rng, subjects)
        subject = Subject("key", ("thingummy",), subjects[scene.subject].drawings)
        said = set(re.findall(r"\w+", caption(rng, scene, subject).lower().replace("grey", "gray")))
        assert said & words["colour"] == ({scene.colour} if scene.colour_named else set())
        assert said & words["place"] == ({scene.place} if scene.place else set())
        assert said & words["style"] == ({STYLES[scene.drawing]} if scene.style_named else set())
        assert bool(said & words["size"]) == scene.small and "thingummy" in said
    assert label(subjects[0], 0) == "apple" and label(subjects[0], 1) == "flat apple"


def test_articles() -> None:
    said = {
        "apple": "an apple",
        "grapes": "grapes",
        "octopus": "an octopus",
        "unicorn": "a unicorn",
        "hourglass": "an hourglass",
    }
    assert {noun: article(noun) for noun in said} == said and article("small jeans") == "small jeans"


def test_the_shown_prompts_are_fixed_and_of_different_subjects() -> None:
    subjects = listed()
    first = shown(subjects)
    assert first == shown(subjects) and len({scene.subject for scene, _ in first}) == 64
    assert {"flat", "3d"} <= {word for _, text in first for word in text.lower().split()}
    other = [replace(each, key="x" + each.key) for each in subjects]
    assert [text for _, text in shown(other)] == [text for _, text in first]  # names and places in the list alone count


def test_drawings_come_out_of_the_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two archives as npm packs them: webp files, and one SVG of SVGs."""
    square = '<svg viewBox="0 0 128 128" id="{}"><rect width="128" height="64" fill="#f00"/></svg>'
    kept = dict(list(names().items())[-3:])
    monkeypatch.setattr("data.names", lambda: kept)
    for style, (package, version) in PACKAGES.items():
        with tarfile.open(tmp_path / f"{package.strip('@').replace('/', '-')}-{version}.tgz", "w:gz") as tar:
            files: dict[str, Any] = {f"package/assets/{key}-fe0f.webp": encoded(key) for key in kept}
            if style == "flat":
                inner = "".join(square.format(key.upper()) for key in [*kept, "1F600"])
                files = {"package/sprites/all.svg": f'<svg xmlns="http://www.w3.org/2000/svg">{inner}</svg>'.encode()}
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    subjects = load_subjects(tmp_path)
    assert [each.key for each in subjects] == list(kept) and code("2764-FE0F") == "2764"
    for each in subjects:
        three, flat = (np.asarray(drawn.convert("RGBA")) for drawn in each.drawings)
        assert three.shape == flat.shape == (256, 256, 4)
        assert flat[30, 30].tolist() == [255, 0, 0, 255] and flat[200, 30, 3] == 0
        assert three[..., 3].mean() > 100


def encoded(key: str) -> bytes:
    file = io.BytesIO()
    drawing(len(key)).convert("RGBA").save(file, "webp")
    return file.getvalue()
