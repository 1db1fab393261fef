"""`instep loras list | check` and `--lora`: LoRAs of a folder as tables, in a picture, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.parts.commands import Run, one_line


def write_lora(file: Path, model: Path) -> None:
    """A LoRA of rank 2 for the queries of a tiny model, in diffusers' own names."""
    state = {}
    for name, value in load_file(next((model / "transformer").glob("*.safetensors"))).items():
        if name.endswith("attn.to_q.weight"):
            stem, (out, width) = f"transformer.{name.removesuffix('.weight')}", value.shape
            state |= {f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.ones(out, 2)}
    file.parent.mkdir()
    save_file(state, file)


@pytest.fixture
def models(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One tiny model with a LoRA that fits, and the variant of both."""
    folder = tmp_path / "models"
    shutil.copytree(tiny / "tiny-sd3", folder / "tiny-sd3")
    write_lora(folder / "loras" / "ink.safetensors", folder / "tiny-sd3")
    (folder / "loras" / "ink.toml").write_text('description = "black lines"\ntrigger_words = ["inkline"]\n')
    (folder / "inky").mkdir()
    card = 'id = "inky"\nbase = "tiny-sd3"\nloras = [{ name = "ink", weight = 0.5 }]\n'
    (folder / "inky" / "card.toml").write_text(card, encoding="utf-8")
    monkeypatch.setenv("INSTEP_MODELS", str(folder))
    return folder


def test_list_and_check_say_what_they_fit(run: Run, models: Path) -> None:
    for command in ("list", "check"):
        found = run("loras", command)
        assert found.exit_code == 0
        (line,) = found.stdout.splitlines()[1:]
        assert line.split()[:3] == ["ink", "tiny-sd3", "2"] and "inkline" in line and "black lines" in line
    copy = shutil.copy(models / "loras" / "ink.safetensors", models / "other.safetensors")
    assert "other  tiny-sd3" in run("loras", "check", copy).stdout and "ink" in run("loras", "check", "ink").stdout


def test_check_names_what_fits_nothing(run: Run, models: Path) -> None:
    (models / "loras" / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    found = run("loras", "check")
    assert found.exit_code == 1 and "1 of 2 LoRAs fit no model: bad" in found.stderr
    assert "none" in found.stdout.splitlines()[1]
    assert "nothing" in one_line(run("loras", "check", "nothing"))
    (models / "loras" / "notes.txt").write_text("no LoRA")
    assert "1 of 1 LoRAs fit no model: notes.txt" in run("loras", "check", models / "loras" / "notes.txt").stderr


def test_a_picture_has_them_and_the_file_says_so(run: Run, models: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, words in (
        ("plain", ()),
        ("lora", ("--lora", "ink:0.5")),
        ("zero", ("--lora", "ink:0")),
        ("variant", ("--model", "inky")),
    ):
        file = tmp_path / f"{name}.png"
        made = run("generate", "a red apple", "--model", "tiny-sd3", "--seed", "1", *words, "-o", file)
        assert made.exit_code == 0, made.output
        image = Image.open(file)
        drawn[name] = image.tobytes(), json.loads(image.info["instep"]).get("loras")  # type: ignore[attr-defined]
    assert drawn["plain"] == drawn["zero"] and drawn["lora"] == drawn["variant"] != drawn["plain"]
    assert drawn["lora"][1] == [{"name": "ink", "weight": 0.5}]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ink:x", "--lora: expects NAME or NAME:WEIGHT"),
        ("ink:3", "loras.0.weight: expects a number from -2 to 2"),
        ("inc", 'there is no LoRA "inc"; did you mean "ink"?'),
    ],
)
def test_a_wrong_one_is_one_line(run: Run, models: Path, word: str, said: str) -> None:
    assert said in one_line(run("generate", "a", "--model", "tiny-sd3", "--lora", word))


def test_a_variant_is_shown_with_its_base(run: Run, models: Path) -> None:
    assert "as tiny-sd3" in run("models", "list").stdout
    assert "tiny-sd3 + ink:0.5" in run("models", "show", "inky").stdout
    assert "inky" not in run("models", "check", models / "tiny-sd3").stdout
