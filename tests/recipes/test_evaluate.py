"""Scoring through the engine: what is asked, of which card, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data
import data64
import numpy as np
import pytest
from data import COLOURS
from evaluate import Run, ask, read_run, scenes_of, without_t5
from PIL import Image

from app.cards.cards import read_cards
from app.checkpoints.parts import read_parts
from tests.recipes.conftest import ROOT, run

pytestmark = pytest.mark.slow


def test_a_card_may_have_settings_of_its_own() -> None:
    assert read_run("a", 4, None, True) == Run("a", 4, None, True)
    assert read_run("a:steps=2,guidance=0,t5=no", 4, 3.0, True) == Run("a", 2, 0.0, False)
    assert read_run("a:t5=yes", 4, 3.0, False).name == "a, 4 steps, guidance 3"
    assert read_run("a:lora=b,weight=0.5", None, None, True).name == "a, b at 0.5"
    with pytest.raises(SystemExit, match="step is none of"):
        read_run("a:step=2", None, None, True)


def test_what_is_asked_of_a_subject_is_always_the_same(subjects: list[Any]) -> None:
    first = [ask(data, subjects, index, 0, False) for index in range(12)]
    assert first == [ask(data, subjects, index, 0, False) for index in range(12)]
    assert ask(data, subjects[5:], 0, 0, False).text == first[5].text
    assert ask(data, subjects, 0, 1, False).seed != first[0].seed
    for index, asked in enumerate(first):
        assert asked.scene.subject == index and asked.scene.colour in asked.text.lower().replace("grey", "gray")
    assert len({asked.scene.colour for asked in first}) > 4
    label = ask(data, subjects, 3, 0, True)
    assert ask(data, subjects, 3, 1, True).text == "flat thing 3"
    assert label.text == "thing 3" and label.scene.colour == "white" and not label.scene.place


def test_the_scenes_are_those_of_the_size(made: Path) -> None:
    cards, small = read_cards(made), read_cards(ROOT / "models")
    assert scenes_of(list(cards.values())) is data
    assert scenes_of([small[name] for name in ("emoji-mmdit", "emoji-dit")]) is data64
    with pytest.raises(SystemExit, match="one by one"):
        scenes_of([cards["emoji-mmdit"], small["emoji-mmdit"]])


def test_colours_are_all_asked(subjects: list[Any]) -> None:
    colours = [ask(data, subjects, i, again, False).scene.colour for i in range(12) for again in range(20)]
    assert set(colours) == set(COLOURS) and max(np.unique(colours, return_counts=True)[1]) < 50


def test_without_t5_is_all_the_other_parts(made: Path, tmp_path: Path) -> None:
    cards = read_cards(made)
    for name in ("emoji-mmdit", "emoji-mmdit-turbo"):
        bare = without_t5(cards[name], tmp_path)
        before, after = ({p.name: p.folder for p in read_parts(card, cards)} for card in (cards[name], bare))
        assert before.keys() - after.keys() == {"text_encoder_3", "tokenizer_3"}
        assert all(before[part] == folder for part, folder in after.items())


def test_a_table_a_line_and_grids(
    subjects: list[Any], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ("emoji-mmdit:t5=no", "emoji-mmdit-turbo:steps=1,guidance=0", "emoji-dit")
    options = ("--models", made, "--steps", 2, "--subjects", 12, "--limit", 3, "--device", "cpu", "--ceiling")
    run("evaluate", subjects, *runs, *options, "--grid", tmp_path / "g.png", "--json", tmp_path / "out.jsonl")
    printed = capsys.readouterr().out.splitlines()
    names = ["emoji-mmdit, 2 steps, no T5", "emoji-mmdit-turbo, 1 steps, guidance 0", "emoji-dit, 2 steps"]
    assert [line.split(" | ")[0] for line in printed[-7:-1]][2:] == [f"| {name}" for name in [*names, "the VAE alone"]]
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line == json.loads(printed[-1]) and [each["run"] for each in line["runs"]] == [*names, "the VAE alone"]
    for each in line["runs"]:
        assert each["subject"][1] + each["subject_new"][1] == 3
    assert line["runs"][2]["background"] == [0, 0] and line["runs"][3]["subject"][0] >= 2
    sheets = [Image.open(tmp_path / f"g-{number}.png") for number in range(4)]
    assert all(sheet.size == (16 * 132, 132) for sheet in sheets)
