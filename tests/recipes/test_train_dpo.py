"""Diffusion-DPO: which pictures are better, the loss, and an adapter from pictures to file that the server can load."""

from __future__ import annotations

import re
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import Scene, Subject
from data64 import SIZE, caption, draw_scene
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scores import Score
from train_dpo import RANK, adapt, errors, margins, rank, read_pairs
from train_mmdit import build

from tests.parts.close import FORWARD, apart, close, furthest
from tests.recipes.conftest import ROOT, run

pytestmark = pytest.mark.slow

BASE = ROOT / "models" / "emoji-mmdit"
RIGHT = Score(True, True, True, True, None, None, 20.0, 0.9)


@pytest.fixture(scope="module")
def trained(subjects: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of each of twelve made-up subjects, two steps of training; the folder of it all."""
    folder = tmp_path_factory.mktemp("dpo")
    words = ("--base", BASE, "--out", folder / "loras/a.safetensors", "--work", folder, "--draw", 6, "--each", 2)
    words += ("--steps", 1, "--subjects", 12, "--minutes", 0.003, "--batch", 2, "--margin", 0.0, "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch:  # which no network draws right that has never seen them
        patch.setattr("train_dpo.rank", lambda scores, margin: [(0, len(scores) - 1)])
        run("train_dpo", subjects, *words)
    return folder


def scored(**changes: Any) -> Score:
    return Score(**{**vars(RIGHT), **changes})


def test_right_is_better_than_wrong_and_sharp_than_soft() -> None:
    wrong, soft = scored(subject=False), scored(sharpness=0.7)
    assert rank([RIGHT, wrong], 0.1) == [(0, 1)] and rank([wrong, soft, RIGHT], 0.1) == [(1, 0), (2, 0), (2, 1)]
    assert rank([RIGHT, scored(sharpness=0.85)], 0.1) == [] == rank([wrong, scored(subject=False, sharpness=0.1)], 0.1)
    for flaw in ({"background": False}, {"spot": False}):
        assert rank([scored(**flaw), soft], 0.1) == [(1, 0)]
    assert rank([scored(spot=True), wrong], 0.1) == [(0, 1)]


def test_the_margin_is_the_papers() -> None:
    """Equation 14, its errors written out, with another network in the place of the trained one; in float64."""
    network, frozen = (build(BASE).double().requires_grad_(False) for _ in range(2))
    torch.manual_seed(0)
    randn = partial(torch.randn, dtype=torch.float64)
    for p in network.parameters():
        p.add_(1e-2 * p.abs().mean() * torch.randn_like(p))
    x, noise, sigma = randn(4, 16, 8, 8), randn(2, 16, 8, 8), torch.tensor([0.3, 0.8]).double()
    text = (randn(4, 28, 160), randn(4, 128))

    def error(net: SD3Transformer2DModel, row: int, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen = ((1 - t) * x[row] + t * eps)[None]
        out = net(seen, text[0][row : row + 1], text[1][row : row + 1], 1000 * t[None], return_dict=False)[0]
        return (out[0] - (eps - x[row])).square().mean()

    def plain(flip: bool = False) -> torch.Tensor:
        rows = []
        for at in range(2):
            other = noise[at].flip(0) if flip else noise[at]
            good = error(network, at, noise[at], sigma[at]) - error(frozen, at, noise[at], sigma[at])
            bad = error(network, at + 2, other, sigma[at]) - error(frozen, at + 2, other, sigma[at])
            rows.append(-(good - bad))
        return torch.stack(rows)

    found = margins(network, frozen, x, noise, sigma, text)
    close(found, plain(), FORWARD, furthest)
    apart(found, plain(flip=True), FORWARD, furthest, of="another noise for the worse one:")
    assert margins(frozen, frozen, x, noise, sigma, text).abs().max() == 0


def test_an_adapter_starts_as_none_and_only_it_is_trained() -> None:
    network, frozen = adapt(build(BASE)), build(BASE)
    sizes = [p.shape for name, p in network.named_parameters() if p.requires_grad]
    assert len(sizes) == 2 * (
        3 * 12 + 9
    )  # the last block has no output for the text and all(RANK in size for size in sizes)
    x, text = torch.randn(2, 16, 8, 8), (torch.randn(2, 28, 160), torch.randn(2, 128))
    sigma = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        assert torch.equal(errors(network, x, x, sigma, text), errors(frozen, x, x, sigma, text))


def test_pictures_are_kept_and_the_file_is_an_adapter(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_dpo.rank", lambda scores, margin: [(0, len(scores) - 1)])
    learn, measure = read_pairs(trained / "pictures", -10.0)
    files = sorted((trained / "pictures").glob("*.pt"))
    pictures = [torch.load(file)["latents"] for file in files]
    assert {each.shape[2:] for each in pictures} == {(16, 8, 8)} and {len(each) for each in pictures} == {2}
    count = sum(each.shape[1] for each in pictures)
    assert count == 2 * (len(learn.captions) + len(measure.captions)) and len(learn.latents) == 2 * count
    by_caption = torch.cat([each.transpose(0, 1).reshape(-1, 4, 16, 8, 8) for each in pictures])
    assert torch.equal(learn.latents.view(-1, 4, 16, 8, 8), by_caption)
    file = trained / "loras/a.safetensors"
    state = load_file(file)
    assert file.stat().st_size < 1_000_000 and file.with_suffix(".toml").exists()
    assert all(re.fullmatch(r"transformer\.transformer_blocks\.\d\..+\.lora_[AB]\.weight", name) for name in state)
    assert {each.shape["lora_B" in name] for name, each in state.items()} == {RANK}
    assert any(each.abs().max() > 0 for name, each in state.items() if "lora_B" in name)


def test_its_scores_stand_beside_the_bases(
    subjects: list[Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the engine: weight 0 is the base itself, and a strong weight is not."""
    strong = {name: 40 * each for name, each in load_file(trained / "loras/a.safetensors").items()}
    save_file(strong, tmp_path / "a.safetensors")
    runs = [f"emoji-mmdit:lora=a,weight={weight}" for weight in (0, 2)]
    options = ("--models", ROOT / "models", "--loras", tmp_path, "--steps", 2, "--subjects", 12, "--limit", 2)
    run("evaluate", subjects, "emoji-mmdit", *runs, *options, "--dtype", "float32", "--grid", tmp_path / "g.png")
    printed = capsys.readouterr().out
    assert "emoji-mmdit, a at 0, 2 steps against emoji-mmdit, 2 steps: 0 subjects" in printed
    base, none, full = (np.asarray(Image.open(tmp_path / f"g-{number}.png")) for number in range(3))
    assert base.shape == (68, 16 * 68, 3)
    assert np.array_equal(base[2:66, 2:66], none[2:66, 2:66]) and not np.array_equal(base, full)


def test_the_shipped_adapter_is_small_and_of_this_form() -> None:
    folder = ROOT / "models" / "loras"
    assert (folder / "emoji-dpo.safetensors").stat().st_size < 1_000_000
    facts = tomllib.loads((folder / "emoji-dpo.toml").read_text())
    assert facts["description"] and facts["trigger_words"] == []
    with safe_open(folder / "emoji-dpo.safetensors", "pt") as file:
        names = set(file.keys())
        ranks = {file.get_slice(name).get_shape()["lora_B" in name] for name in names}
    expected = {name for name, p in adapt(build(BASE)).named_parameters() if p.requires_grad}
    assert ranks == {RANK} and names == {f"transformer.{name.replace('.default', '')}" for name in expected}


def test_the_scenes_of_64_pixels() -> None:
    """A scene that says a place lies there, and a caption says it."""
    picture = torch.zeros(1)  # no drawing is looked at
    subject = Subject("key", ("thingummy", "thing"), (picture, picture))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    scenes: list[Scene] = [draw_scene(rng, [subject]) for _ in range(300)]
    assert {s.side for s in scenes} == {30, 42, 52, 58, 64}
    for scene in scenes:
        assert min(scene.x, scene.y) >= 0 and max(scene.x, scene.y) + scene.side <= SIZE
        said = caption(rng, scene, subject).lower()
        assert "thing" in said and scene.small == ("small" in said)
        assert (scene.place or "") in said and (scene.colour in said) == scene.colour_named
