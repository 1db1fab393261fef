"""The recipes on the path, and a few made-up subjects: the real drawings are not in the repository."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "models" / "recipes"))


def drawing(seed: int) -> Image.Image:
    """A disc of twelve coloured wedges and rings on nothing, the same for the same seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256] - 127.5
    ring, wedge = (np.hypot(x, y) // 40).astype(int), ((np.arctan2(y, x) + np.pi) // (np.pi / 2)).astype(int) % 4
    pixels = np.zeros((256, 256, 4), dtype=np.uint8)
    pixels[..., :3] = rng.integers(256, size=(4, 4, 3))[ring.clip(max=3), wedge]
    pixels[..., 3] = 255 * (np.hypot(x, y) < 120)
    return Image.fromarray(pixels).convert("RGBa")


def run(script: str, subjects: list[Any], *words: object) -> None:
    """A recipe as from the command line, but on these subjects, and a step counts as 0.1 s however long it took."""
    module, clock = importlib.import_module(script), importlib.import_module("common").Clock
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for each in (module, *map(importlib.import_module, ("data", "data64"))):
            patch.setattr(each, "load_subjects", lambda cache, count=0: subjects[: count or None], raising=False)
        patch.setattr(clock, "tick", lambda self: setattr(self, "used", self.used + 0.1))
        patch.setattr(sys, "argv", [script, *map(str, words)])
        module.main()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made(subjects: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cards, each trained for twelve steps: an MMDiT in its two halves, a DiT, and a turbo."""
    folder = tmp_path_factory.mktemp("made")
    mmdit, pool = folder / "emoji-mmdit", folder / "runs/pool"
    mmdit.mkdir()
    (mmdit / "vae").symlink_to(ROOT / "models" / "emoji-mmdit" / "vae")
    common = ("--minutes", 0.02, "--batch", 4, "--device", "cpu")
    run("train_dit", subjects[:3], *common, "--work", folder / "runs/dit", "--out", folder / "emoji-dit")
    run("train_text", subjects, *common, "--work", folder / "runs/text", "--out", mmdit)
    half = ("--out", mmdit, "--pool", pool, "--scenes", 64)
    run("train_mmdit", subjects, *common, *half, "--pooled", "--work", folder / "runs/pooled")
    run("train_mmdit", subjects, *common, *half, "--init", mmdit, "--work", folder / "runs/mmdit")
    ends = ("--teacher", mmdit, "--out", folder / "emoji-mmdit-turbo", "--work", folder / "runs/turbo")
    run("distill_turbo", subjects, *common, *ends, "--subjects", 12, "--pairs", 8, "--draw", 4, "--steps", 2)
    return folder


@pytest.fixture(scope="session")
def subjects() -> list[Any]:
    """Twelve subjects in two drawings each."""
    from data import Subject

    return [Subject(f"key{i}", (f"thing {i}",), (drawing(2 * i), drawing(2 * i + 1))) for i in range(12)]
