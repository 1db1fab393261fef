"""Single files of Stable Diffusion: recognised, added and drawn with, without asking the Hub."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.parts import originals
from tests.parts.commands import Run, one_line
from tests.parts.tiers import tiers
from tests.parts.tiny_unets import write_unet

KINDS = {"sd1.5": "sd15", "sd2.1": "sd2", "sd2.1-base": "sd2", "sdxl": "sdxl", "sdxl-turbo": "sdxl-turbo"}
KINDS["sdxl-refiner"] = "refiner"
PARTS = {
    "sd1.5": ["unet", "vae", "text_encoder"],
    "sd2.1": ["unet", "vae", "text_encoder"],
    "sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "sdxl-refiner": ["unet", "vae", "text_encoder_2"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cards of the shipped ids, and beside them single files of the same networks."""
    folder = tmp_path_factory.mktemp("unets")
    for name, kind in KINDS.items():
        write_unet(folder / "models" / name, kind, sdxl="sdxl", layers_per_block=2)
    base = folder / "models" / "sd2.1-base" / "card.toml"
    base.write_text(base.read_text().replace('prediction = "v"', 'prediction = "epsilon"'))
    for name in PARTS:
        originals.write(originals.unet_file(folder / "models" / name), folder / f"my-{name}.safetensors")
    return folder


@pytest.fixture
def store(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of these cards. There is no Hub."""
    folder = tmp_path / "models"
    folder.mkdir()
    for model in (written / "models").iterdir():
        (folder / model.name).symlink_to(model)
    monkeypatch.setenv("INSTEP_MODELS", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


ALIKE = 0.01
"""Mean levels between two pictures that are the same: 0.0003 were seen, one value of 3,072 rounded the other way."""


def picture(run: Run, model: str, out: Path, seed: int = 3) -> np.ndarray:
    drawn = run("generate", "red apple", "--model", model, "--seed", seed, "--steps", 2, "--out", out / f"{model}.png")
    assert drawn.exit_code == 0, drawn.output
    return np.asarray(Image.open(out / f"{model}.png"), dtype=int)


@pytest.mark.parametrize("name", tiers(zip(PARTS, strict=True), "sdxl".__eq__))
def test_a_single_file_is_recognised_and_added(run: Run, written: Path, store: Path, name: str) -> None:
    file = written / f"my-{name}.safetensors"
    told = run("models", "check", file)
    assert told.exit_code == 0, told.output
    fits = {"sd2.1": "sd2.1, sd2.1-base", "sdxl": "sdxl, sdxl-turbo"}
    assert told.stdout.splitlines()[0].split(":")[0] == f"fits {fits.get(name, name)}"
    rows = {line.split()[0]: line for line in told.stdout.splitlines()}
    assert all("stored as float32" in rows[part] for part in PARTS[name])
    assert "5 tensors belong to no layout that is known here, the first: alphas_cumprod\n" in told.stdout
    assert f"next: instep models add {file} --like {name} --rest {name}\n" in told.stdout
    made = run("models", "add", file, "--id", "mine", "--like", name, "--rest", name)
    assert made.exit_code == 0, made.output
    card = tomllib.loads((store / "mine" / "card.toml").read_text())
    assert card["files"] == dict.fromkeys(PARTS[name], str(file))
    assert {part.partition("_")[0] for part in card["components"]} == {"tokenizer"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_single_file_draws_what_its_folder_draws(
    run: Run, written: Path, store: Path, tmp_path: Path, name: str
) -> None:
    file = written / f"my-{name}.safetensors"
    assert run("models", "add", file, "--id", "mine", "--like", name, "--rest", name).exit_code == 0
    assert run("models", "check").exit_code == 0
    ours, theirs = picture(run, "mine", tmp_path), picture(run, name, tmp_path)
    assert np.abs(ours - theirs).mean() < ALIKE and np.ptp(ours) > 20
    assert np.abs(ours - picture(run, "mine", tmp_path, seed=4)).mean() > 100 * ALIKE


@pytest.mark.parametrize("zeros", [True, False])
def test_a_folder_says_what_an_absent_negative_prompt_is(run: Run, store: Path, tmp_path: Path, zeros: bool) -> None:
    """Not the card that it is like; and no refiner comes with that."""
    folder = tmp_path / "theirs"
    shutil.copytree(store / "sdxl", folder)
    (folder / "card.toml").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zeros}))
    like = tmp_path / "models" / "sdxl"
    like.unlink()
    shutil.copytree(folder, like)
    like_card = (store / "sdxl-turbo" / "card.toml").read_text().replace("sdxl-turbo", "sdxl")
    (like / "card.toml").write_text('refiner = { model = "sdxl-refiner" }\n' + like_card)
    made = run("models", "add", folder, "--id", "mine", "--like", "sdxl")
    assert made.exit_code == 0, made.output
    card = tomllib.loads((store / "mine" / "card.toml").read_text())
    assert card["force_zeros"] is zeros and "refiner" not in card


@pytest.mark.parametrize(
    ("name", "both"),
    [
        ("sd2.1", ["sd2.1", "sd2.1-base"]),
        pytest.param("sdxl", ["sdxl", "sdxl-turbo"], marks=pytest.mark.slow),
    ],
    ids=["sd2.1", "sdxl"],
)
@pytest.mark.slow
def test_what_no_tensor_can_tell_has_to_be_said(
    run: Run, written: Path, store: Path, name: str, both: list[str]
) -> None:
    """Noise or velocity, and a turbo's timesteps: the card that is named decides."""
    file = written / f"my-{name}.safetensors"
    said = one_line(run("models", "add", file))
    assert said == f"{file}: fits {', '.join(both)}, and the files cannot tell which: say it with --like"
    other = one_line(run("models", "add", file, "--like", "sd1.5"))
    assert other == f"{file}: is not like sd1.5; it fits {', '.join(both)}"
    schedules = []
    for like in both:
        made = run("models", "add", file, "--id", f"as-{like}", "--like", like, "--rest", like)
        assert made.exit_code == 0, made.output
        card = tomllib.loads((store / f"as-{like}" / "card.toml").read_text())
        assert card["schedule"] == tomllib.loads((store / like / "card.toml").read_text())["schedule"]
        schedules.append(card["schedule"])
    assert schedules[0] != schedules[1]


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        (
            "sd1.5",
            {"model.diffusion_model.input_blocks.1.0.in_layers.4.bias": torch.ones(2)},
            "unexpected weights: inp",
        ),
        ("sd1.5", {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 9, 3, 3)}, "shape [8, 9, 3, 3], not"),
        ("sdxl", {"model.diffusion_model.label_emb.0.0.bias": torch.ones(3)}, "add_embedding.linear_1.bias has shape"),
    ],
    ids=["a name too many", "inpainting", "another embedder"],
)
def test_another_network_fits_no_card(
    run: Run, written: Path, store: Path, tmp_path: Path, name: str, wrong: originals.State, words: str
) -> None:
    """The nearest card is named, and a transformer is never among them."""
    file = originals.write(load_file(written / f"my-{name}.safetensors") | wrong, tmp_path / "other.safetensors")
    said = one_line(run("models", "check", file))
    assert said.startswith(f"{file}: fits no card; the nearest is {name}, but its unet is another: ") and words in said


@pytest.mark.slow
def test_encoders_cannot_be_left_out(run: Run, written: Path, store: Path, tmp_path: Path) -> None:
    state = load_file(written / "my-sdxl.safetensors")
    bare = {name: value for name, value in state.items() if not name.startswith("conditioner.embedders.1.")}
    file = originals.write(bare, tmp_path / "bare.safetensors")
    table = run("models", "check", file).stdout
    assert "missing, and needed" in next(line for line in table.splitlines() if line.startswith("text_encoder_2"))
    said = one_line(run("models", "add", file, "--like", "sdxl"))
    assert said.startswith(f"{file}: text_encoder_2, tokenizer, tokenizer_2 missing: give --text-encoder-2 PATH")


@pytest.mark.slow
def test_a_folder_of_half_precision_copies_draws(run: Run, store: Path, tmp_path: Path) -> None:
    """As a clone of a repository with `*.fp16.safetensors` alone; and a safety checker, which is not loaded."""
    folder = tmp_path / "my-sd"
    write_unet(folder, "sd15", layers_per_block=2)
    (folder / "card.toml").unlink()
    for file in folder.rglob("*.safetensors"):
        originals.write(
            {name: value.half() for name, value in load_file(file).items()}, file.with_suffix(".fp16.safetensors")
        )
        file.unlink()
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("{", '{\n"safety_checker": ["stable_diffusion", "Checker"],', 1))
    made = run("models", "add", folder, "--id", "mine")
    assert made.exit_code == 0 and ", like sd1.5; " in made.stdout, made.output
    assert "stored as float16" in run("models", "check", folder).stdout
    ours, theirs = picture(run, "mine", tmp_path), picture(run, "sd1.5", tmp_path)
    assert np.abs(ours - theirs).max() <= 3 and np.ptp(ours) > 20
