"""A user's own files: `check` and `add` judge them alike, take their own facts, and say what is no checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.parts import originals
from tests.parts.commands import Run, one_line
from tests.parts.tiers import tiers
from tests.parts.tiny import write_sd3

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 16294\n"
FOREIGN = {
    "lfs": (LFS, "is a Git LFS pointer to a file of 16294 bytes"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(400), "is a GGUF file, which this server does not load"),
    "page": (b'\n<!doctype html>\n<html lang="en"><head>' + b" " * 900, "is a web page, not a checkpoint"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(99), "is a compressed archive"),
    "words": (b"Invalid username or password.", "is a text, not a checkpoint; it begins 'Invalid username"),
    "empty": (b"", "is an empty file"),
}


@pytest.fixture
def store(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards with one of the shipped ids: a tiny sd3.5-medium."""
    folder = tmp_path / "models"
    shutil.copytree(tiny / "tiny-sd3", folder / "sd3.5-medium")
    card = folder / "sd3.5-medium" / "card.toml"
    card.write_text(card.read_text().replace('"tiny-sd3"', '"sd3.5-medium"'))
    monkeypatch.setenv("INSTEP_MODELS", str(folder))
    return folder


@pytest.fixture
def tuned(tiny: Path, tmp_path: Path) -> Path:
    """A fine-tune of it, as diffusers saves one, in a folder of the user's."""
    write_sd3(tmp_path / "work" / "my-sd3.5-tune", seed=20)
    (tmp_path / "work" / "my-sd3.5-tune" / "card.toml").unlink()
    return tmp_path / "work" / "my-sd3.5-tune"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def picture(run: Run, model: str, out: Path) -> np.ndarray:
    drawn = run("generate", "red apple", "--model", model, "--seed", 3, "--steps", 3, "--out", out / f"{model}.png")
    assert drawn.exit_code == 0, drawn.output
    return np.asarray(Image.open(out / f"{model}.png"), dtype=int)


def test_the_folders_own_schedule_draws(run: Run, store: Path, tuned: Path, tmp_path: Path) -> None:
    """Its scheduler_config.json says shift 1.0, where the card that it is like has 3.0."""
    edit(tuned / "scheduler" / "scheduler_config.json", shift=1.0)
    told = run("models", "check", tuned)
    assert "the schedule is the folder's own: shift is 1.0, not 3.0\n" in told.stdout and told.exit_code == 0
    made = run("models", "add", tuned)
    assert made.exit_code == 0 and "the schedule is the folder's own: shift is 1.0, not 3.0\n" in made.stdout
    card = tomllib.loads((store / "my-sd3.5-tune" / "card.toml").read_text())
    assert card["schedule"]["shift"] == 1.0 and card["like"] == "sd3.5-medium"
    for name, shift in (("by-hand", 1.0), ("wrong", 3.0)):
        shutil.copytree(tuned, store / name)
        text = (store / "sd3.5-medium" / "card.toml").read_text().replace('"sd3.5-medium"', f'"{name}"')
        (store / name / "card.toml").write_text(text.replace("shift = 3.0", f"shift = {shift}"))
    added, right, wrong = (picture(run, name, tmp_path) for name in ("my-sd3.5-tune", "by-hand", "wrong"))
    assert np.array_equal(added, right) and np.abs(added - wrong).max() > 10


def test_a_folders_own_vae_is_read_by_its_own_config(run: Run, store: Path, tuned: Path) -> None:
    """Another scale than that of the card that it is like is a fact of the folder, not a fault."""
    edit(tuned / "vae" / "config.json", scaling_factor=1.1, shift_factor=0.2)
    assert run("models", "check", tuned).exit_code == 0
    assert run("models", "add", tuned).exit_code == 0
    assert run("models", "check").exit_code == 0


def test_a_second_fine_tune_finds_the_card_that_it_is_like(run: Run, store: Path, tuned: Path) -> None:
    """Without --like, though the first one fits too; and ids that are taken get a number."""
    other = tuned.parent / "other" / tuned.name
    write_sd3(other, seed=40)
    for folder, model in ((tuned, "my-sd3.5-tune"), (other, "my-sd3.5-tune-2"), (other, "my-sd3.5-tune-3")):
        made = run("models", "add", folder)
        assert made.exit_code == 0, made.output
        assert made.stdout.startswith(f"{model}: {store / model / 'card.toml'}, like sd3.5-medium; ")
    assert run("models", "check", other).stdout.startswith("fits sd3.5-medium\n")
    assert {line.split()[1] for line in run("models", "check").stdout.splitlines()[1:]} == {"ok"}
    assert "give another with --id" in one_line(run("models", "add", other, "--id", "my-sd3.5-tune"))


def test_a_fine_tune_of_a_base_of_ones_own(run: Run, store: Path, tuned: Path) -> None:
    """No shipped card among those that fit: what was made of another one is no base."""
    card = store / "sd3.5-medium" / "card.toml"
    card.write_text(card.read_text().replace('"sd3.5-medium"', '"own"'))
    for model in ("one", "two"):
        made = run("models", "add", tuned, "--id", model)
        assert made.exit_code == 0 and ", like own; " in made.stdout, made.output


def no_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer_2").iterdir():
        file.unlink()


def narrow(folder: Path) -> None:
    """A CLIP that is whole, but not as wide as the network wants it."""
    shutil.rmtree(folder / "text_encoder_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")


def scheduler(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **changes)


def index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **changes)


def foreign(part: str, kind: str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / part / next((folder / part).glob("*.safetensors")).name).write_bytes(FOREIGN[kind][0]) and None
    )


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "clips": (scheduler(clip_sample=True), "clip_sample is true"),
    "karras": (scheduler(use_karras_sigmas=True), "use_karras_sigmas is true, which no schedule here has"),
    "terminal": (scheduler(shift_terminal=0.1), "shift_terminal is 0.1, which no schedule here has"),
    "other kind": (scheduler(_class_name="DDIMScheduler", clip_sample=False), "is for a diffusion model"),
    "a tokenizer without files": (no_tokenizer, "tokenizer.json: missing"),
    "a tokenizer that is gone": (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer"),
    "an encoder that is gone": (lambda folder: shutil.rmtree(folder / "text_encoder_3"), "text_encoder_3"),
    "another CLIP": (narrow, "the CLIPs' pooled widths are not the network's"),
    "a part of no use": (index(upscaler=["diffusers", "Upscaler"]), 'upscaler: "Upscaler" is not a class'),
    "a part that is another": (index(vae=["diffusers", "CLIPTextModel"]), 'vae: "CLIPTextModel" is not a class'),
    "lfs": (foreign("vae", "lfs"), FOREIGN["lfs"][1]),
    "a page": (foreign("text_encoder_3", "page"), FOREIGN["page"][1]),
    "lfs network": (foreign("transformer", "lfs"), FOREIGN["lfs"][1]),
}


@pytest.mark.parametrize("case", tiers(zip(SPOILED, strict=True), lambda case: list(SPOILED).index(case) % 3 == 0))
def test_check_refuses_the_folders_that_add_refuses(run: Run, store: Path, tuned: Path, case: str) -> None:
    spoil, reason = SPOILED[case]
    spoil(tuned)
    before = sorted(path.name for path in store.iterdir())
    checked, added = run("models", "check", tuned), run("models", "add", tuned)
    assert reason in one_line(checked) and one_line(checked) == one_line(added)
    assert "next:" not in checked.stdout
    assert sorted(path.name for path in store.iterdir()) == before


def test_a_folder_that_lacks_parts_is_told_where_they_come_from(
    run: Run, store: Path, tuned: Path, tmp_path: Path
) -> None:
    """A fine-tune saved without its VAE and encoders: --rest takes them from the card that it is like."""
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(tuned / part)
    edit(tuned / "model_index.json", **{f"text_encoder{number}": [None, None] for number in ("", "_2", "_3")})
    said = one_line(run("models", "check", tuned))
    assert said == one_line(run("models", "add", tuned))
    assert said == f"{tuned}: vae missing: give --rest sd3.5-medium to take what is missing from that card"
    made = run("models", "add", tuned, "--rest", "sd3.5-medium")
    assert made.exit_code == 0, made.output
    assert picture(run, "my-sd3.5-tune", tmp_path).shape == (32, 32, 3)


def test_the_command_that_check_prints_for_a_file_works(run: Run, store: Path, tiny: Path, tmp_path: Path) -> None:
    file = originals.write(originals.sd3_file(tiny / "tiny-sd3"), tmp_path / "tune.safetensors")
    told = run("models", "check", file)
    (command,) = re.findall(r"next: instep (.*)\n", told.stdout)
    made = run(*command.split())
    assert made.exit_code == 0, made.output
    assert picture(run, "tune", tmp_path).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_named(run: Run, store: Path, tmp_path: Path, kind: str) -> None:
    content, words = FOREIGN[kind]
    file = tmp_path / "flux1-dev.safetensors"
    file.write_bytes(content)
    for command in ("check", "add"):
        assert one_line(run("models", command, file)).startswith(f"{file}: {words}")


@pytest.mark.parametrize("kind", ["lfs", "gguf", "page", "gzip"])
def test_a_pt_that_is_none_is_named(run: Run, store: Path, tiny: Path, tmp_path: Path, kind: str) -> None:
    content, words = FOREIGN[kind]
    file = tmp_path / "DiT-XL-2-256x256.pt"
    file.write_bytes(content)
    convert = ("models", "convert", file, tmp_path / "dit", "--vae", tiny / "tiny-dit" / "vae")
    for command in (("models", "check", file), ("models", "add", file), convert):
        assert one_line(run(*command)).startswith(f"{file}: {words}")
    torch.save({"x": torch.zeros(2)}, whole := tmp_path / "whole.pt")
    vae = shutil.copy(file, tmp_path / "vae.safetensors")
    assert words in one_line(run("models", "check", vae))
    assert one_line(run("models", "check", shutil.copy(whole, tmp_path / "a.safetensors"))).startswith(
        f"{tmp_path / 'a.safetensors'}: is a torch file, whatever its name says"
    )


def test_a_gguf_by_its_own_name(run: Run, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "flux1-dev-Q4_0.gguf"
    file.write_bytes(FOREIGN["gguf"][0])
    assert one_line(run("models", "check", file)).startswith(f"{file}: is a GGUF file")


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_load_says_what_the_file_is(run: Run, store: Path, kind: str) -> None:
    content, words = FOREIGN[kind]
    file = next((store / "sd3.5-medium" / "transformer").glob("*.safetensors"))
    file.write_bytes(content)
    assert words in one_line(run("generate", "a red apple", "--model", "sd3.5-medium"))
    assert words in run("models", "check").stdout
    assert run("models", "list").stdout.splitlines()[1].split()[4] == "none"


def eighths(state: dict[str, torch.Tensor], *heads: str) -> dict[str, torch.Tensor]:
    return {key: value.to(torch.float8_e4m3fn) if key.startswith(heads) else value for key, value in state.items()}


@pytest.mark.parametrize("alone", [True, False])
def test_a_network_in_eighths_is_an_error_and_not_an_absence(
    run: Run, store: Path, tiny: Path, tmp_path: Path, alone: bool
) -> None:
    """As the fp8 files of ComfyUI: the network alone, or beside a VAE and encoders in other formats."""
    state = originals.sd3_file(tiny / "tiny-sd3", "text_encoder_3")
    state = {key: value for key, value in state.items() if not alone or key.startswith("model.diffusion_model.")}
    file = originals.write(eighths(state, "model.diffusion_model."), tmp_path / "fp8.safetensors")
    for command in ("check", "add"):
        said = one_line(run("models", command, file))
        assert (
            said.startswith(f"{file}: ") and "number format F8_E4M3 (8-bit floats), which this server does not" in said
        )


def test_a_folder_in_eighths_is_an_error(run: Run, store: Path, tuned: Path) -> None:
    file = next((tuned / "transformer").glob("*.safetensors"))
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}, file)
    for command in ("check", "add"):
        assert "number format F8_E4M3 (8-bit floats)" in one_line(run("models", command, tuned))


def test_add_says_which_encoders_the_model_is_without(run: Run, store: Path, tiny: Path, tmp_path: Path) -> None:
    state = originals.sd3_file(tiny / "tiny-sd3", "text_encoder", "text_encoder_2", "text_encoder_3")
    file = originals.write(eighths(state, "text_encoders.t5xxl."), tmp_path / "mixed.safetensors")
    made = run("models", "add", file, "--tokenizers", tiny / "tiny-sd3")
    assert made.exit_code == 0, made.output
    (line,) = (line for line in made.stdout.splitlines() if line.startswith("without "))
    assert line.startswith("without text_encoder_3: ") and "F8_E4M3" in line and "long prompts" in line


def test_a_card_by_hand_that_differs_from_its_folder_is_said_so(run: Run, store: Path) -> None:
    edit(store / "sd3.5-medium" / "scheduler" / "scheduler_config.json", shift=1.0, use_karras_sigmas=False)
    told = run("models", "check")
    assert told.exit_code == 0
    assert "ok 8 parts; its scheduler_config.json differs from the card: shift is 1.0, not 3.0" in " ".join(
        told.stdout.split()
    )
    edit(store / "sd3.5-medium" / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    told = " ".join(run("models", "check").stdout.split())
    assert "ok 8 parts; the card does not follow" in told and "use_karras_sigmas is true" in told
