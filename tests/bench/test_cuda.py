"""The GPU's sweep at tiny size on the CPU: every line that it writes, and what becomes of a card that fails."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch

from app.cards.card import parse_size
from app.cards.cards import read_cards
from app.families.base import Family
from app.settings import Settings
from tests.bench import cuda
from tests.bench.cuda import BACKENDS, CARDS, SHAPES, TINY_CARDS, TINY_SHAPES, Plan

pytestmark = pytest.mark.slow


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "cuda.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_line_of_the_sweep(tmp_path: Path) -> None:
    cuda.main(["--out", str(tmp_path), "--tiny", "--rounds", "1"])
    found = lines(tmp_path)
    (attended,) = [line for line in found if line["bench"] == "attention"]
    assert set(attended["ms"]) == set(BACKENDS) and attended["ms"]["CUDNN_ATTENTION"] == "refused"
    assert attended["ms"]["MATH"]["median"] > 0 and attended["shape"] == list(TINY_SHAPES["tiny, 2 passes"])
    told = [(line["model"], line["bench"], line["size"], line.get("passes")) for line in found if "size" in line]
    assert told == [
        ("tiny-dit", "step", "32x32", 1), ("tiny-dit", "step", "32x32", 2), ("tiny-dit", "decode", "32x32", None),
        ("tiny-dit", "image", "32x32", None),
        ("tiny-sd3", "step", "32x32", 1), ("tiny-sd3", "step", "32x32", 2), ("tiny-sd3", "step", "64x64", 1),
        ("tiny-sd3", "decode", "32x32", None), ("tiny-sd3", "decode", "64x64", None),
        ("tiny-sd3", "image", "32x32", None),
    ]  # fmt: skip
    assert [line["model"] for line in found if line["bench"] == "facts"] == list(TINY_CARDS)
    assert found[-1]["ms"]["eager-float32"]["median"] > 0


def test_a_card_that_fails_says_so_and_the_next_one_comes(tmp_path: Path) -> None:
    plan = Plan({}, ())
    cards = {"no-such-card": plan, "tiny-dit": plan}
    models = tmp_path / "models"
    cuda.write_models(models)
    settings = Settings(models=models, devices="cpu", cache=tmp_path / "cache")
    found = [(line["bench"], line["model"]) for line in cuda.sweep(settings, {}, cards, 1) if line["bench"] != "decode"]
    assert found == [("failed", "no-such-card"), ("facts", "tiny-dit")]


def test_a_card_is_gone_before_the_next_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []

    def spied(settings: Settings, pool: object, family: Family, *_: object) -> list[dict[str, object]]:
        assert all(network() is None for network in alive)
        alive.append(weakref.ref(family.network))
        return []

    monkeypatch.setattr(cuda, "of_card", spied)
    cuda.write_models(tmp_path / "models")
    settings = Settings(models=tmp_path / "models", devices="cpu", cache=tmp_path / "cache")
    names = ("tiny-dit", "tiny-sd3", "tiny-sd3-turbo")
    list(cuda.sweep(settings, {}, dict.fromkeys(names, Plan({}, ())), 1))
    assert len(alive) == 3


def test_the_sweep_asks_for_what_the_cards_allow() -> None:
    cards = read_cards(Path("models"))
    for name, plan in CARDS.items():
        sizes = cards[name].limits.sizes
        for text in (*plan.steps, *(size for _, _, size in plan.images)):
            assert all(sizes.min <= side <= sizes.max and side % sizes.multiple == 0 for side in parse_size(text)), name
    assert {shape.head for shape in SHAPES.values()} == {64, 72, 128}
    assert all(hasattr(torch.nn.attention.SDPBackend, name) for name in BACKENDS)
