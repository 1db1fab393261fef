"""`instep generate` draws what the engine draws, tells how to ask a server for it, and fails in one line."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import Result

from app.cards.catalog import Registry
from app.cli import generate, paint
from app.cli.generate import build, curl, file_name, kind_of
from app.cli.options import open_registry
from app.engine.runner import Runner
from app.errors import EngineError, InvalidValue
from app.jobs.body import read_body
from app.report import Progress, Timings
from app.report import Result as Drawn
from app.settings import Settings
from app.worker.process import Local
from tests.parts.close import SAME, apart, close, furthest
from tests.parts.commands import Run, one_line
from tests.parts.tiny_parts import spoil


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


def direct(body: dict[str, object]) -> list[Drawn]:
    """The same body through an engine, with nothing of the command between."""
    settings = Settings()
    registry = open_registry(settings)
    job = build(body, registry, "direct", keep_latents=True)
    with Local(settings, registry.cards) as local:
        return local.submit(job).future.result()


def drawn(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_it_draws_saves_and_tells(run: Run) -> None:
    words = (
        "--model",
        "tiny-sd3",
        "--steps",
        3,
        "--guidance",
        2,
        "--seed",
        11,
        "--size",
        "32x16",
        "--negative",
        "blue",
    )
    lines = drawn(run("generate", "red cat", *words, "--save-latents", "l.safetensors"))
    assert lines[0].startswith("red-cat-11.png  tiny-sd3  seed 11  ") and lines[1] == "latents l.safetensors"
    body = {"prompt": "red cat", "model": "tiny-sd3", "num_inference_steps": 3, "guidance_scale": 2.0, "seed": 11}
    body |= {"size": "32x16", "negative_prompt": "blue"}
    assert json.loads(lines[2].split("-d '")[1].split("' -o")[0]) == body
    twin = direct(body)[0]
    picture = Image.open("red-cat-11.png")
    assert (np.asarray(picture) == twin.pixels).all()
    facts = json.loads(picture.text["instep"])
    assert {key: facts[key] for key in body} == body
    latents = load_file("l.safetensors")["latents"]
    assert latents.dtype == np.float32 and twin.latents is not None
    assert np.array_equal(latents, twin.latents[None])


def test_another_schedule_is_drawn_and_told(run: Run) -> None:
    words = ("generate", "red cat", "--model", "tiny-sd3", "--steps", 3, "--seed", 11)
    _, curl = drawn(run(*words, "--schedule", "karras", "-o", "karras.png"))
    assert '"schedule": "karras"' in curl
    picture = Image.open("karras.png")
    assert json.loads(picture.text["instep"])["schedule"] == "karras"
    assert "Sampler: flow_euler, Schedule type: Karras" in picture.text["parameters"]
    body = {"prompt": "red cat", "model": "tiny-sd3", "num_inference_steps": 3, "seed": 11}
    assert (np.asarray(picture) == direct(body | {"schedule": "karras"})[0].pixels).all()
    assert (np.asarray(picture) != direct(body)[0].pixels).any()


def test_several_images_of_a_class(run: Run) -> None:
    words = ("--class-label", "green", "--model", "tiny-dit", "--steps", 2, "--seed", 3, "-n", 2, "-o", "g.jpg")
    lines = drawn(run("generate", *words, "--save-latents", "l.safetensors"))
    names = [line.split("  ")[:3] for line in lines[:2]]
    assert names == [["g-1.jpg", "tiny-dit", "seed 3"], ["g-2.jpg", "tiny-dit", "seed 4"]]
    assert all(Image.open(name).format == "JPEG" for name in ("g-1.jpg", "g-2.jpg"))
    alone = direct({"class_label": "green", "model": "tiny-dit", "num_inference_steps": 2, "seed": 4})[0]
    assert alone.latents is not None
    first, second = load_file("l.safetensors")["latents"]
    close(second, alone.latents, SAME, furthest)
    apart(first, alone.latents, SAME, furthest, of="another seed:")


def test_a_random_seed_is_told_and_makes_the_same_again(run: Run) -> None:
    words = ("generate", "red", "--model", "tiny-sd3", "--steps", 2)
    line, curl = drawn(run(*words, "--seed", -1, "-o", "one.png"))
    seed = int(line.split("  ")[2].removeprefix("seed "))
    assert 0 <= seed < 2**32 and f'"seed": {seed}' in curl
    drawn(run(*words, "--seed", seed, "-o", "two.png"))
    assert (np.asarray(Image.open("one.png")) == np.asarray(Image.open("two.png"))).all()


def test_what_is_without_effect_is_said(run: Run) -> None:
    result = run("generate", "a (red:1.3) cat", "--model", "tiny-sd3-turbo", "--steps", 1, "--negative", "blue")
    assert result.exit_code == 0
    first, second = result.stderr.splitlines()
    assert first.startswith('instep: prompt: "(red:1.3)" is read as plain text')
    assert second.startswith("instep: negative_prompt is ignored") and second.endswith("draws without by default")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("red", "--model", "tiny-sd"), 'There is no model "tiny-sd"'),
        (("red", "--model", "tiny-sd3", "--steps", 0), "num_inference_steps: expects 1 to 100"),
        (("red", "--model", "tiny-sd3", "--sampler", "ddim"), "sampler: expects one of flow_euler"),
        (("red", "--model", "tiny-sd3", "--sampler", "Euler Karras"), '"flow_euler" with "schedule": "karras"?'),
        (("red", "--model", "tiny-sd3", "--schedule", "beta"), "schedule: expects one of karras"),
        (("red", "--model", "tiny-sd3", "--clip-skip", 1), "clip_skip: tiny-sd3 reads CLIP as it was trained to"),
        (("red", "--model", "tiny-sd3", "--size", "17x32"), "size: tiny-sd3 has no size"),
        (("--model", "tiny-sd3"), "prompt: is required"),
        (("--model", "tiny-dit", "--class-label", "gren"), "has no such class; did you mean"),
        (("red", "-o", "red.gif"), "red.gif: the name must end in .png"),
        (("red", "--save-latents", "no/l.safetensors"), "there is no folder no"),
        (("red", "--guidance", "much"), "Invalid value for '--guidance'"),
        (("red", "--models", "nowhere"), "no cards in nowhere"),
    ],
)
def test_a_bad_request_is_one_line(run: Run, words: tuple[object, ...], said: str) -> None:
    assert said in one_line(run("generate", *words))
    assert list(Path.cwd().iterdir()) == []


def test_a_broken_checkpoint_is_one_line(run: Run, tiny: Path) -> None:
    Path("broken").mkdir()
    card = (tiny / "tiny-dit" / "card.toml").read_text().replace("tiny-dit", "broken")
    Path("broken", "card.toml").write_text(card.replace('family = "dit"', 'family = "sd3"'))
    assert "model_index.json: missing" in one_line(run("generate", "red", "--models", "."))


def test_an_error_of_the_engine_ends_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Local, "submit", lambda local, job: job.fail(EngineError("the network gave NaN", code="non_finite_output"))
    )
    assert one_line(run("generate", "red", "--model", "tiny-sd3")).endswith("the network gave NaN")


@pytest.mark.parametrize("words", [("generate", "red", "--model"), ("compare", "--prompt", "red")])
def test_a_picture_that_is_not_finite_is_no_file(run: Run, tiny: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    models = tmp_path / "elsewhere"
    shutil.copytree(tiny / "tiny-sd3", models / "tiny-sd3")
    spoil(models / "tiny-sd3" / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias")
    result = run(*words, "tiny-sd3", "--steps", 2, "--models", models)
    assert result.exit_code == 1 and not [*tmp_path.glob("*.png")]
    assert result.stderr.splitlines()[-1].endswith("not finite") and "Traceback" not in result.output


def test_an_engine_that_dies_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "run", lambda *_: [][1])
    assert "the engine stopped: IndexError" in one_line(run("generate", "red", "--model", "tiny-sd3"))


def test_a_terminal_sees_bars_and_the_picture(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry = open_registry(Settings())
    job = build({"prompt": "red", "model": "tiny-sd3", "n": 2, "seed": 1}, registry, "generate")
    pixels = np.full((16, 32, 3), 200, np.uint8)
    timings = Timings(0.0, 0.1, 0.2, 0.3, 4, 1.0)
    told = [Progress("generate", 1, step, 4) for step in (1, 2, 3)]
    told += [Drawn("generate", index, 1 + index, pixels, timings) for index in (1, 0)]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system="truecolor")
    with paint.bars_of(console, [job], generate.image_of):
        for report in told:
            job.hear(report)
    (results,) = paint.results([job])
    assert "image 2" in screen.getvalue() and "3/4" in screen.getvalue()
    assert [result.index for result in results] == [0, 1]
    generate.deliver(console, job, results, tmp_path / "a.png", 9.0)
    assert screen.getvalue().count("▀") == 2 * 8 * 32
    assert f"{tmp_path / 'a-2.png'}  tiny-sd3  seed 2  0.60 s (9.0 s with loading)" in screen.getvalue()


def test_the_command_of_the_readme_draws_with_the_built_in_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is named, and no file of the published ones is here."""
    monkeypatch.setenv("INSTEP_MODELS", str(Path(__file__).parent.parent.parent / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    lines = drawn(run("generate", "red apple on a blue background", "--steps", 20, "--seed", 7))
    assert lines[0].startswith("red-apple-on-a-blue-background-7.png  emoji-mmdit  seed 7  ")
    pixels = np.asarray(Image.open("red-apple-on-a-blue-background-7.png"), dtype=int)
    assert np.abs(pixels[0, 0] - (37, 99, 235)).max() < 40, "the blue of the background"
    assert '"model": "emoji-mmdit"' in lines[-1]
