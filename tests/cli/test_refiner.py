"""`--refiner`, `--switch-at` and the sizes of SDXL on the command line, and the panel of the legacy models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.cli.options import nested, open_registry
from app.errors import InvalidValue
from app.jobs import compare
from app.jobs.compare import PRESETS, read_comparison
from app.settings import Settings
from tests.parts.commands import Run, one_line
from tests.parts.published import write_published

REFINED = ("--refiner", "sdxl-refiner")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints under the ids of published cards."""
    folder = tmp_path_factory.mktemp("published") / "models"
    write_published(folder, "sd2.1", "sdxl", "sdxl-refiner")
    return folder


def test_flags_of_objects_become_fields() -> None:
    absent = {"refiner": None, "switch_at": None, "crop": None}
    assert nested({"seed": 7, **absent}) == {"seed": 7, "refiner": None, "crop": None}
    assert nested({**absent, "refiner": "fine"})["refiner"] == {"model": "fine"}
    found = nested({"refiner": "fine", "switch_at": 0.5, "crop": (3, 4)})
    assert found == {"refiner": {"model": "fine", "switch_at": 0.5}, "crop": [3, 4]}
    with pytest.raises(InvalidValue, match="--switch-at: needs --refiner beside it"):
        nested({**absent, "switch_at": 0.5})


@pytest.mark.slow  # it writes the files first
def test_wrong_ones_are_one_line(run: Run, published: Path) -> None:
    wrong = run("generate", "red", "--model", "sd2.1", *REFINED, "--models", published)
    assert one_line(wrong).startswith(
        "refiner.model: sdxl-refiner cannot go on with pictures of sd2.1: its VAE's scaling"
    )
    wrong = run("generate", "red", "--model", "sdxl", *REFINED, "--switch-at", 1, "--models", published)
    assert one_line(wrong) == "refiner.switch_at: expects a number over 0 and under 1"
    wrong = run("generate", "red", "--model", "sd2.1", "--crop", 1, 2, "--models", published)
    assert one_line(wrong) == "crop: sd2.1 has no network that takes sizes, as those of SDXL do"


@pytest.mark.slow
def test_a_picture_with_a_refiner_and_its_curl(run: Run, published: Path) -> None:
    words = ("red", "--model", "sdxl", "--steps", 6, "--seed", 5, "--models", published)
    sizes = ("--original-size", "512x256", "--crop", 3, 4, "--target-size", "640x480")
    drawn = {}
    for name, more in (("plain", ()), ("refined", REFINED), ("late", (*REFINED, "--switch-at", 0.9)), ("sized", sizes)):
        done = run("generate", *words, *more, "-o", f"{name}.png")
        assert done.exit_code == 0, done.output
        drawn[name] = np.asarray(Image.open(f"{name}.png"))
        command = shlex.split(done.stdout.splitlines()[-1])
        body = json.loads(command[command.index("-d") + 1])
        assert body.get("refiner") == (None if name in ("plain", "sized") else {
            "model": "sdxl-refiner", "switch_at": 0.9 if name == "late" else 0.8
        })  # fmt: skip
    assert body.items() >= {"original_size": "512x256", "crop": [3, 4], "target_size": "640x480"}.items()
    assert len({pixels.tobytes() for pixels in drawn.values()}) == 4


@pytest.mark.slow  # it writes the files first
def test_a_preset_without_models_has_no_column_for_its_refiner(published: Path) -> None:
    registry = open_registry(Settings(models=published))
    found = {
        name: read_comparison({"preset": "two_prompts", "refiner": {"model": name}}, registry).models
        for name in ("sdxl-refiner", "none")
    }
    assert found == {"sdxl-refiner": ["sd2.1", "sdxl"], "none": ["sd2.1", "sdxl-refiner", "sdxl"]}


@pytest.mark.slow
def test_the_legacy_panel_counts_the_refiner(run: Run, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts by SD 2.1 and SDXL with its refiner; each cell is the picture that is drawn alone."""
    seen: dict[str, Any] = {}

    def spy(cells: Any, rows: Sequence[str], columns: Sequence[Sequence[str]], corner: str) -> np.ndarray:
        seen.update(cells=cells, rows=rows, columns=columns)
        return drawn(cells, rows, columns, corner)

    drawn = compare.panel
    monkeypatch.setattr(compare, "panel", spy)
    words = ("compare", "sdxl", "sd2.1", *REFINED, "--preset", "two_prompts", "--seed", 0, "--models", published)
    done = run(*words, "-o", "panel.png")
    assert done.exit_code == 0, done.output
    assert seen["columns"] == [
        ["sd2.1", "865.9 M parameters", "steps 28, guidance 7"],
        ["sdxl + sdxl-refiner", "2.57 B + 2.26 B parameters", "steps 28, guidance 7"],
    ]
    assert seen["rows"] == PRESETS["two_prompts"]["prompt"]
    assert "instep: sd2.1: refiner is left out: sdxl-refiner does not fit" in done.stderr.splitlines()
    facts = json.loads(Image.open("panel.png").text["instep"])
    assert facts["models"] == ["sd2.1", "sdxl"] and facts["refiner"] == {"model": "sdxl-refiner", "switch_at": 0.8}
    alone = ("--steps", 28, "--guidance", 7, "--seed", 0, "--models", published, "-o", "alone.png")
    for row, prompt in enumerate(seen["rows"]):
        for column, model in enumerate((("sd2.1",), ("sdxl", *REFINED))):
            assert run("generate", prompt, "--model", *model, *alone).exit_code == 0
            twin = np.asarray(Image.open("alone.png"), int)
            assert np.abs(seen["cells"][row][column].astype(int) - twin).max() <= 2
