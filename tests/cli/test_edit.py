"""`instep generate --image`: what the engine draws from a picture, the curl that asks a server for it, errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.cli.generate import build, curl
from app.settings import Settings
from tests.parts.commands import Run, one_line
from tests.parts.servers import Server


def noise(file: str, *shape: int) -> np.ndarray:
    """A file of random pixels, and these."""
    pixels = np.random.default_rng(4).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


def pixels_of(file: str) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def hole(file: str, width: int, height: int) -> np.ndarray:
    """A mask, white in a rectangle, and where that is."""
    inside = np.zeros((height, width), bool)
    inside[4:12, 8:24] = True
    Image.fromarray((inside * 255).astype(np.uint8)).save(file)
    return inside


@pytest.mark.parametrize("model", ["tiny-sd3", pytest.param("tiny-dit", marks=pytest.mark.slow)])
def test_it_draws_inside_the_mask(run: Run, model: str) -> None:
    picture, inside = noise("in.png", 32, 32, 3), hole("mask.png", 32, 32)
    what = ("red cat",) if model == "tiny-sd3" else ("--class-label", "green")
    words = (*what, "--model", model, "--steps", 4, "--seed", 3, "--image", "in.png", "--mask", "mask.png")
    result = run("generate", *words, "--size", "32x32", "--strength", 0.75, "--mask-blur", 0, "-o", "out.png")
    assert result.exit_code == 0, result.output
    drawn = pixels_of("out.png")
    assert np.array_equal(drawn[~inside], picture[~inside]) and (drawn[inside] != picture[inside]).any()
    told = json.loads(Image.open("out.png").text["instep"])  # type: ignore[attr-defined]
    assert told.items() >= {"strength": 0.75, "mask_blur": 0, "seed": 3, "size": "32x32"}.items()
    assert "--form-string strength=0.75" in result.stdout and "mask=@" in result.stdout
    assert run("generate", *words, "--size", "32x32", "--no-overlay", "-o", "plain.png").exit_code == 0
    assert not np.array_equal(pixels_of("plain.png")[~inside], picture[~inside])


def test_without_a_size_it_is_that_of_the_picture(run: Run) -> None:
    noise("in.jpg", 100, 200, 3)
    result = run("generate", "red cat", "--model", "tiny-sd3", "--steps", 2, "--image", "in.jpg", "-o", "out.png")
    assert result.exit_code == 0, result.output
    height, width, _ = pixels_of("out.png").shape
    assert width == 2 * height


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--image", "no.png"), "Invalid value for '--image': file 'no.png' does not exist"),
        (("--image", "."), "Invalid value for '--image': file '.' is a directory"),
        (("--image", "text.png"), "image: "),
        (("--image", "in.png", "--mask", "no.png"), "Invalid value for '--mask': file 'no.png' does not exist"),
        (("--image", "in.png", "--strength", 0), "strength: expects 0.01 to 1"),
        (("--image", "in.png", "--resize", "fill"), "resize: expects one of crop, stretch, pad"),
        (("--mask", "in.png"), "mask: needs a picture, --image"),
        (("--strength", 0.5), "strength: needs a picture, --image"),
        (("--no-overlay",), "overlay: needs a picture, --image"),
    ],
)
def test_a_bad_request_is_one_line(run: Run, words: tuple[object, ...], said: str) -> None:
    noise("in.png", 16, 16, 3)
    Path("text.png").write_text("no picture")
    assert one_line(run("generate", "red", "--model", "tiny-sd3", *words)).startswith(said)
    assert not [*Path.cwd().glob("red*")]


@pytest.mark.parametrize("name", ["in.png", 'my "pictures"; type=text, of 5\'.png'])
def test_the_printed_curl_works(server: Server, settings: Settings, tmp_path: Path, name: str) -> None:
    """Names and prompts with everything that a shell or a form reads in its own way."""
    registry = Registry(read_cards(settings.models), settings)
    files = {"image": tmp_path / name, "mask": tmp_path / f"mask {name}"}
    picture, inside = noise(str(files["image"]), 32, 32, 3), hole(str(files["mask"]), 32, 32)
    prompts = ['@it\'s a "red" $HOME;type=a', "<b, ü"]
    body = {"prompt": prompts, "strength": 0.75, "overlay": True, "mask_blur": 0, "negative_prompt": "@a"}
    job = build({**body, "grid": {"columns": 1}}, registry, "a", files)
    port = int(server.url.rpartition(":")[2])
    words = curl(job, Settings(port=port), tmp_path / "out.png", files)
    assert words.startswith(f"curl localhost:{port}/v1/images/edits ") and "-F" in words
    done = subprocess.run(["bash", "-c", f"{words} --silent --show-error"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sheet = pixels_of(str(tmp_path / "out.png"))
    assert sheet.shape == (64, 32, 3)
    told = json.loads(Image.open(tmp_path / "out.png").text["instep"])  # type: ignore[attr-defined]
    assert (told["prompt"], told["negative_prompt"], told["strength"]) == (prompts, "@a", 0.75)
    assert told["seed"] == job.request.images[0].seed
    assert all(np.array_equal(one[~inside], picture[~inside]) for one in (sheet[:32], sheet[32:]))
