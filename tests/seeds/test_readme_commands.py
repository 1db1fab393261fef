"""The commands that the README shows under "Three pictures", run as they stand there on tiny checkpoints.

The cards are the shipped ones, with their ids, samplers and schedules; sizes, text lengths and weights are tiny ones.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from app.cli.commands import app
from app.jobs.compare import PRESETS
from tests.parts.published import write_published
from tests.readmes.blocks import BLOCKS

pytestmark = pytest.mark.slow

Run = Callable[[str], list[str]]


def commands() -> list[str]:
    """The lines of the fenced blocks of the README's section."""
    chosen = [block for block in BLOCKS if (block.document, block.heading) == ("README.md", "Three pictures")]
    return [line for block in chosen for line in block.text.splitlines()]


def options(line: str) -> dict[str, str]:
    """The options of a command, by name; what stands before the first of them is "words"."""
    words = shlex.split(line)
    assert words[0] == "instep" and max(map(len, line.splitlines())) < 130
    named = {name: value for name, value in pairwise(words) if name.startswith("-")}
    return {**named, "words": " ".join(word for word in words[1:3] if not word.startswith("-"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints of the layouts of the cards that the commands name."""
    folder = tmp_path_factory.mktemp("seeds") / "models"
    write_published(folder, "dit-xl-2-256", "sd3-medium", "sd3.5-large", "sd3.5-large-turbo", "flux.1-schnell")
    write_published(folder, "sd2.1", "sdxl", "sdxl-refiner")
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one line in an empty folder and returns what it says. NOTE: equal bytes are what DETERMINISTIC promises."""
    settings = {"MODELS": models, "CACHE": models.parent, "DEVICES": "cpu", "DTYPE": "float32", "THREADS": 1}
    for name, value in {**settings, "DETERMINISTIC": True}.items():
        monkeypatch.setenv(f"INSTEP_{name}", str(value))
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> list[str]:
        threads = torch.get_num_threads()
        try:
            done = CliRunner().invoke(app, shlex.split(line)[1:])
        finally:
            torch.set_num_threads(threads)
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()

    return call


def facts(file: str) -> dict[str, object]:
    """The request that a PNG carries."""
    with Image.open(file) as image:
        image.load()
        assert "Seed: 0" in image.text["parameters"]
        return dict(json.loads(image.text["instep"]))


def pixels(file: str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_the_readme_asks_for_what_people_ask_for() -> None:
    dit, turbo, schnell, compare = map(options, commands())
    asked = {"--model": "dit-xl-2-256", "--class-label": "162,247,248,254", "--steps": "100", "--guidance": "4"}
    assert {name: dit[name] for name in asked} == asked and (dit["--seed"], dit["--columns"]) == ("0", "2")
    for one, model in ((turbo, "sd3.5-large-turbo"), (schnell, "flux.1-schnell")):
        assert (one["--model"], one["--steps"], one["--guidance"], one["--seed"]) == (model, "4", "0", "0")
        assert one["words"].startswith("generate ")
    assert (compare["words"], compare["--preset"]) == ("compare sd2.1", "two_prompts")
    assert compare["--refiner"] == "sdxl-refiner"


@pytest.mark.parametrize("place", range(4), ids=["dit", "turbo", "schnell", "compare"])
def test_the_same_command_twice_gives_the_same_bytes(run: Run, place: int) -> None:
    line = commands()[place]
    out = Path(options(line)["-o"])
    said, digests = [str(out), *filter(None, [options(line).get("--model")]), "seed 0", ""], set()
    for _ in range(2):
        assert run(line)[0].startswith("  ".join(said))
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        out.unlink()
    assert len(digests) == 1


def test_the_labels_are_two_by_two_with_seeds_that_count_up(run: Run) -> None:
    line = commands()[0]
    file = options(line)["-o"]
    run(line)
    wanted = {"model": "dit-xl-2-256", "class_label": [162, 247, 248, 254], "grid": {"columns": 2}, "seed": 0}
    wanted |= {"size": "32x32", "sampler": "ddpm", "num_inference_steps": 100, "guidance_scale": 4.0}
    assert facts(file) == wanted
    sheet = pixels(file)
    assert sheet.shape == (64, 64, 3)
    for index, label in enumerate((162, 247, 248, 254)):
        words = f"--class-label {label} --steps 100 --guidance 4 --seed {index} -o a.png"
        run(f"instep generate --model dit-xl-2-256 {words}")
        top, left = 32 * (index // 2), 32 * (index % 2)
        assert np.abs(sheet[top : top + 32, left : left + 32].astype(int) - pixels("a.png")).max() <= 1
    assert len({sheet[top : top + 32, left : left + 32].tobytes() for top in (0, 32) for left in (0, 32)}) == 4


@pytest.mark.parametrize("place", [1, 2], ids=["turbo", "schnell"])
def test_four_steps_without_guidance(run: Run, place: int) -> None:
    line = commands()[place]
    given = options(line)
    told = run(line)
    assert pixels(given["-o"]).shape == (32, 32, 3) and pixels(given["-o"]).std() > 1
    request = facts(given["-o"])
    wanted = {"model": given["--model"], "num_inference_steps": 4, "guidance_scale": 0.0, "seed": 0, "size": "32x32"}
    assert {name: request[name] for name in wanted} == wanted
    assert request["sampler"] == "flow_euler" and given["words"] == f"generate {request['prompt']}"
    body = json.loads(shlex.split(told[-1])[shlex.split(told[-1]).index("-d") + 1])
    assert body.items() <= {**request, "model": given["--model"]}.items()


def test_the_panel_of_the_preset(run: Run) -> None:
    line = commands()[3]
    run(line)
    request = facts(options(line)["-o"])
    assert request["models"] == ["sd2.1", "sd3-medium", "sdxl", "sd3.5-large"] and request["seed"] == 0
    assert request["refiner"] == {"model": "sdxl-refiner", "switch_at": 0.8}, "sdxl is the third with it, by size"
    assert request["prompt"] == PRESETS["two_prompts"]["prompt"]
    assert (request["num_inference_steps"], request["guidance_scale"]) == (28, 7.0)
    height, width, _ = pixels(options(line)["-o"]).shape
    assert width > 4 * 256 + 100 and height > 2 * 256 + 40
