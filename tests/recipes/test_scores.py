"""What counts as right: background, size, place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from data import COLOURS, PLACES, Scene, draw_scene, render
from nearest import Match
from PIL import Image, ImageFilter
from scores import (
    Asked,
    Score,
    against,
    background,
    score,
    share,
    sharpness,
    spot_is_right,
    summary,
    table,
)


def match(scene: Scene, **changes: Any) -> Match:
    return replace(Match(scene.subject, scene.drawing, scene.mirrored, scene.side, scene.x, scene.y, 1.0), **changes)


def test_the_background_is_the_median_of_the_border(subjects: list[Any]) -> None:
    for colour in COLOURS:
        scene = Scene(0, colour, True, False, None, 0, False, 120, 4, 4)
        picture = render(scene, subjects[0])
        picture[0, :80] = 77  # not the most of the border
        assert background(picture) == colour


def test_every_scene_is_where_its_caption_says(subjects: list[Any]) -> None:
    rng = np.random.default_rng(0)
    said = {True: 0, None: 0, False: 0}
    for _ in range(500):
        scene = draw_scene(rng, subjects)
        said[spot_is_right(scene, match(scene))] += 1
    assert said[False] == 0 and said[True] > 100 and said[None] > 100


@pytest.mark.parametrize("place", PLACES)
def test_elsewhere_is_wrong(place: str) -> None:
    at = {"left": (4, 24), "right": (44, 24), "top": (24, 4), "bottom": (24, 44)}
    scene = Scene(0, "red", True, False, place, 0, False, 80, *at[place])
    assert spot_is_right(scene, match(scene)) is True
    others = [spot for name, spot in at.items() if name != place] + [(24, 24), (4, 4), (44, 44), (4, 44), (44, 4)]
    assert not any(spot_is_right(scene, match(scene, x=x, y=y)) for x, y in others)


def test_the_wrong_size_is_wrong() -> None:
    small = Scene(0, "red", True, True, None, 0, False, 56, 36, 36)
    assert spot_is_right(small, match(small)) is True
    assert spot_is_right(small, match(small, side=84, x=22, y=22)) is False
    large = Scene(0, "red", True, False, "left", 0, False, 84, 2, 22)
    assert spot_is_right(large, match(large, side=56, x=4, y=36)) is False
    assert spot_is_right(replace(large, place=None), match(large)) is None


def test_a_table_tells_rights_from_asked(subjects: list[Any]) -> None:
    scene = Scene(0, "white", True, False, None, 0, False, 120, 4, 4)
    picture = render(scene, subjects[0])
    right = score(subjects, {0}, Asked(scene, "", 0), picture, [match(scene)])
    wrong = score(subjects, {0}, Asked(scene, "", 0), picture, [match(scene, subject=1), match(scene)])
    assert (right.subject, wrong.subject, wrong.among_five) == (True, False, True)
    assert score(subjects, {0, 1}, Asked(scene, "", 0), picture, [match(scene, subject=1)]).subject
    line = summary("a card", [right, wrong, wrong], 0.5, classes=False)
    assert line["subject"] == (1, 3) and line["subject_new"] == (0, 0) and line["size_and_place"] == (0, 0)
    assert (
        table([line])
        .splitlines()[2]
        .startswith("| a card | 33.3 % of 3 | - | 100.0 % of 3 | 100.0 % of 3 | - | - | - |")
    )
    assert share([True, None, False]) == (1, 2)


def test_two_runs_are_compared_picture_by_picture() -> None:
    right = Score(True, True, True, True, None, None, 20.0, 0.5)
    wrong, sharp = replace(right, subject=False), replace(right, sharpness=0.6)
    said = against([right, right, wrong, sharp, right], [wrong, wrong, right, right, right])
    assert said.startswith("2 subjects right that were wrong, 1 wrong that were right; of 2 right in both 1 sharper")


def test_sharp_is_the_drawing_itself(subjects: list[Any]) -> None:
    scene = Scene(2, "blue", True, False, None, 1, False, 104, 8, 16)
    drawn = render(scene, subjects[2])
    image, asked = Image.fromarray(drawn), Asked(scene, "", 0)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(2)))
    grainy = (drawn + np.random.default_rng(0).normal(0, 30, drawn.shape)).clip(0, 255).astype(np.uint8)
    clean, *others = (sharpness(subjects, asked, each, match(scene)) for each in (drawn, soft, grainy))
    assert abs(clean - 1) < 1e-5 and all(0 < other < 0.9 for other in others)
