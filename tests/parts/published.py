"""Tiny checkpoints under the ids of the published cards, with the shipped cards' samplers, schedules and guidance.

Sizes, text lengths and weights are tiny; everything else of a card is as it is shipped.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from app.cards.cards import read_card
from tests.families.plain_shapes import dit_state
from tests.parts import originals
from tests.parts.tiny import write_dit, write_flux, write_sd3
from tests.parts.tiny_unets import write_unet

MODELS = Path(__file__).parents[2] / "models"
QK_NORM = {"qk_norm": "rms_norm"}
WRITERS: dict[str, Callable[[Path], None]] = {
    "dit-xl-2-256": partial(write_dit, classes=1000),
    "dit-xl-2-512": partial(write_dit, classes=1000, seed=50),
    "sd3-medium": write_sd3,
    "sd3.5-medium": partial(write_sd3, seed=60, dual_attention_layers=(0,), **QK_NORM),
    "sd3.5-large": partial(write_sd3, seed=20, **QK_NORM),
    "sd3.5-large-turbo": partial(write_sd3, seed=40, **QK_NORM),
    "flux.1-schnell": partial(write_flux, dev=False),
    "flux.1-dev": partial(write_flux, dev=True, seed=70),
    "sd1.5": partial(write_unet, name="sd15"),
    "sd2.1": partial(write_unet, name="sd2"),
    "sd2.1-base": partial(write_unet, name="sd2", seed=100),
    "sd-turbo": partial(write_unet, name="sd2", seed=150),
    "sdxl": partial(write_unet, name="sdxl", sdxl="sdxl"),
    "sdxl-turbo": partial(write_unet, name="sdxl-turbo", seed=200),
    "sdxl-refiner": partial(write_unet, name="refiner", sdxl="sdxl"),
}
TINY = {
    r'size = "\d+x\d+"': 'size = "32x32"',
    r"sizes = \{[^}]*\}": "sizes = { min = 32, max = 32, multiple = 32 }",
    r"text = \{.*\}": "text = { clip = 24, t5 = 24 }",
    r"layers = \[[\d, ]+\]": "layers = [0]",
}
"""What of a card depends on the size of its checkpoint, and what stands there for a tiny one."""
LOCAL = {r"source = \{.*\}": 'source = { path = "." }'}


def tiny_card(name: str, more: dict[str, str] | None = None) -> str:
    """The shipped card of this id for a tiny checkpoint. more: further patterns and what stands in their place."""
    text = (MODELS / name / "card.toml").read_text(encoding="utf-8")
    for fact, tiny in {**TINY, **(more or {})}.items():
        text = re.sub(rf"^(?!#)(.*?){fact}", rf"\g<1>{tiny}", text, flags=re.MULTILINE)
    return text


def write_published(folder: Path, *names: str) -> None:
    """Checkpoints of these ids with their cards, as folders that need no download."""
    for name in names:
        WRITERS[name](folder / name)
        (folder / name / "card.toml").write_text(tiny_card(name, LOCAL), encoding="utf-8")
        ours, theirs = read_card(folder / name / "card.toml"), read_card(MODELS / name / "card.toml")
        assert (ours.id, ours.schedule, ours.parameters) == (theirs.id, theirs.schedule, theirs.parameters)
        assert ours.default_size == (32, 32) and ours.source.path == "."


def write_clone(folder: Path, hub: Path) -> set[str]:
    """Write `models/` of a fresh clone, but with tiny published cards, and their repositories under `hub`.

    The built-in checkpoints are the shipped ones. Returns the names of the gated repositories.
    """
    shutil.copytree(MODELS, folder, ignore=shutil.ignore_patterns(*WRITERS, "recipes"), copy_function=_link)
    gated = set()
    for name, write in WRITERS.items():
        card = read_card(MODELS / name / "card.toml")
        repo = hub / str(card.source.repo)
        write(repo)
        (repo / "card.toml").unlink()
        for config in (*repo.glob("*/config.json"), *repo.glob("*/scheduler_config.json"), repo / "model_index.json"):
            place = folder / name / config.relative_to(repo)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(config, place)
        (folder / name / "card.toml").write_text(tiny_card(name), encoding="utf-8")
        if card.family == "dit":
            _as_torch_files(repo)
        if card.gated:
            gated.add(str(card.source.repo))
    return gated


def _link(source: str, target: str) -> None:
    """Weights are not copied."""
    if source.endswith(".safetensors"):
        Path(target).symlink_to(source)
    else:
        shutil.copyfile(source, target)


def _as_torch_files(repo: Path) -> None:
    """As the DiTs' repositories are."""
    for file in repo.rglob("*.safetensors"):
        torch.save(originals.read(file.parent), file.with_suffix(".bin"))
        file.unlink()


def write_single_files(folder: Path, hub: Path) -> None:
    """What people have on their disk: a network of SD3.5 in one file, a DiT's .pt, and the folder of its VAE."""
    medium = hub / str(read_card(MODELS / "sd3.5-medium" / "card.toml").source.repo)
    state = originals.sd3_file(medium, "text_encoder", "text_encoder_2")
    originals.write(state, folder / "my-finetune.safetensors")
    torch.save(dit_state(width=384, depth=1), folder / "DiT-XL-2-256x256.pt")
    write_dit(folder / "whole")
    shutil.move(folder / "whole" / "vae", folder / "sd-vae-ft-ema")
    shutil.rmtree(folder / "whole")
