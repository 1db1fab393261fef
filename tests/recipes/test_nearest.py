"""The search for the nearest drawing, against errors computed one by one, and on scenes whose drawing is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from data import COLOURS, Scene, draw_scene, render
from nearest import Nearest, energy, features, sprite, twins
from PIL import Image
from torch.nn import functional as F

from tests.parts.close import FORWARD, apart, close, each

pytestmark = pytest.mark.slow


def scenes(subjects: list[Any], count: int) -> list[Scene]:
    rng = np.random.default_rng(5)
    return [draw_scene(rng, subjects, every_pair=True) for _ in range(count)]


def test_the_products_are_the_squared_errors(subjects: list[Any]) -> None:
    """F + (1 - A) c laid into c at every place, the plain way."""
    picture = torch.rand(1, 3, 12, 12)
    colour = torch.tensor([COLOURS["orange"]]) / 255
    small = sprite(subjects[3], 1, 9)
    patches = F.unfold(features(picture, colour), 9)
    fast = energy(small[None], colour) - 2 * small.flatten() @ patches[0]
    empty = (picture - colour[:, :, None, None]).pow(2).sum()
    errors, plain = (fast + empty).flatten(), []
    for at in range(len(errors)):
        x, y = at % 4, at // 4
        laid = colour[0][:, None, None].expand(3, 12, 12).clone()
        window = laid[:, y : y + 9, x : x + 9]
        window.copy_(small[:3] + (1 - small[3:]) * window)
        plain.append((laid - picture[0]).pow(2).sum())
    close(errors, torch.stack(plain), FORWARD, each)
    apart(errors.roll(1), torch.stack(plain), FORWARD, of="another place:")


def test_a_drawing_is_found_where_it_lies(subjects: list[Any]) -> None:
    asked = scenes(subjects, 8)
    pictures = np.stack([render(each, subjects[each.subject]) for each in asked])
    for scene, matches in zip(asked, Nearest(subjects).find(pictures, [s.colour for s in asked]), strict=True):
        best = matches[0]
        assert (best.subject, best.drawing, best.mirrored) == (scene.subject, scene.drawing, scene.mirrored)
        assert (best.side, best.x, best.y) == (scene.side, scene.x, scene.y)
        assert best.error == 0 and matches[1].error > 5


def test_noise_moves_it_little(subjects: list[Any]) -> None:
    asked = scenes(subjects, 8)
    clean = np.stack([render(each, subjects[each.subject]) for each in asked]).astype(np.float32)
    noisy = (clean + np.random.default_rng(0).normal(0, 15, clean.shape)).clip(0, 255).astype(np.uint8)
    for scene, matches in zip(asked, Nearest(subjects).find(noisy, [s.colour for s in asked]), strict=True):
        assert matches[0].subject == scene.subject
        assert max(abs(matches[0].x - scene.x), abs(matches[0].y - scene.y), abs(matches[0].side - scene.side)) <= 1
        assert 10 < matches[0].error < 16


def test_twins_share_a_drawing_or_its_mirror_image(subjects: list[Any]) -> None:
    left = replace(subjects[0], key="left")
    turned = subjects[1].drawings[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    right = replace(subjects[1], key="right", drawings=(subjects[5].drawings[1], turned))
    assert twins([*subjects[:4], left, right]) == [{0, 4}, {1, 5}, {2}, {3}, {0, 4}, {1, 5}]
