"""The DiT's losses against plain formulas, and the card that its recipe writes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bound import TIMES, Levels, bound, weight_of
from common import to_float
from data import every_plain_scene, render
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch.distributions import Normal, kl_divergence
from train_dit import Latents, build, classes, loss_of

from app.cards.cards import read_cards
from app.checkpoints.parts import build_family, build_parts
from app.cli.models import check_folder
from app.families.dit import predict
from app.samplers.grids import alpha_bar
from tests.parts.close import FORWARD, SAME, apart, close, each, furthest
from tests.recipes.conftest import run

pytestmark = pytest.mark.slow

LEVELS = Levels("cpu")


def test_the_levels_are_those_that_the_card_names(made: Path) -> None:
    bar = torch.from_numpy(alpha_bar(read_cards(made)["emoji-dit"].schedule)).float()
    ours = LEVELS.columns["alpha"].flatten() ** 2
    close(ours, bar, FORWARD, each)
    apart(ours.roll(1), bar, FORWARD, each, of="a timestep off:")


def test_the_bound_is_the_divergence_of_two_normals() -> None:
    torch.manual_seed(0)
    t = torch.tensor([1, 40, 500, 999])
    clean, noise, wrong, v = (torch.randn(4, 16, 16, 16) for _ in range(4))
    v = v.clamp(-1, 1)
    x = LEVELS("alpha", t) * clean + LEVELS("sigma", t) * noise
    bar, before = LEVELS("alpha", t) ** 2, LEVELS("alpha", t - 1) ** 2
    beta = 1 - bar / before

    def back(start: torch.Tensor) -> torch.Tensor:
        return (before.sqrt() * beta * start + (bar / before).sqrt() * (1 - before) * x) / (1 - bar)

    guess = (x - LEVELS("sigma", t) * wrong) / LEVELS("alpha", t)
    low = beta * (1 - before) / (1 - bar)
    ours = ((v + 1) / 2 * beta.log() + (1 - v) / 2 * low.log()).exp()
    plain = kl_divergence(Normal(back(clean), low.sqrt()), Normal(back(guess), ours.sqrt())).mean((1, 2, 3))
    found = bound(LEVELS, noise, wrong, v, t, x, clean) * torch.tensor(2.0).log()
    close(found, plain, 1e-2, each)
    further = bound(LEVELS, noise, 1.5 * wrong, v, t, x, clean) * torch.tensor(2.0).log()
    apart(further, plain, 1e-2, each, of="another guess:")


def test_only_the_variance_learns_from_the_bound() -> None:
    torch.manual_seed(0)  # of other draws a gradient may be so near 0 that float32 has no number for it
    t = torch.tensor([3, 700])
    clean, noise = torch.randn(2, 2, 16, 16, 16)
    found, v = torch.randn(2, 2, 16, 16, 16).unbind()
    found.requires_grad_(), v.requires_grad_()
    x = LEVELS("alpha", t) * clean + LEVELS("sigma", t) * noise
    bound(LEVELS, noise, found, v, t, x, clean).sum().backward()
    assert found.grad is None and v.grad is not None and v.grad.abs().min() > 0
    exact = bound(LEVELS, noise, noise, torch.full_like(noise, -1), t, x, clean)
    close(1 + exact, torch.ones_like(exact), SAME, furthest)
    off = bound(LEVELS, noise, noise, torch.full_like(noise, 1), t, x, clean)
    apart(1 + off, torch.ones_like(off), SAME, furthest, of="the other variance:")


def test_weights_fall_with_the_signal() -> None:
    snr = torch.tensor([1e-4, 0.5, 1.0, 5.0, 50.0])
    close(weight_of(snr, 5, 5), torch.tensor([5.0, 2.0, 1.0, 1.0, 0.1]), FORWARD, each)
    close(weight_of(snr, 5, 1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1]), FORWARD, each)
    apart(weight_of(snr, 5, 1), weight_of(snr, 5, 5), FORWARD, each)


@pytest.mark.parametrize(("empty", "rows"), [(0.0, {2}), (1.0, {5})])
def test_a_label_is_dropped_for_every_block_or_for_none(empty: float, rows: set[int]) -> None:
    model = build(5)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    torch.nn.init.normal_(model.proj_out_2.weight)
    args = Namespace(empty=empty, gamma=5.0, lift=5.0)
    loss_of(model, LEVELS, args, torch.randn(6, 16, 16, 16), torch.full((6,), 2)).backward()
    for block in model.transformer_blocks:
        grad = block.norm1.emb.class_embedder.embedding_table.weight.grad
        assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == rows


def test_the_card_loads_and_knows_its_classes(subjects: list[Any], made: Path) -> None:
    assert check_folder(made, 2)["emoji-dit"] == ("ok", "2 parts")
    cards = read_cards(made)
    card = cards["emoji-dit"]
    assert card.labels == tuple(classes(subjects[:3]))
    parts = build_parts(card, cards, torch.device("cpu"), torch.float32)
    assert parts["transformer"].config.activation_fn == "gelu"
    assert build_family(card, parts, torch.device("cpu"), torch.float32).learned_variance
    assert (made / "emoji-dit" / "subjects.txt").read_text().splitlines() == [each.name for each in subjects[:3]]


def test_diffusers_reads_it_and_so_does_the_server(made: Path) -> None:
    theirs = DiTTransformer2DModel.from_pretrained(made / "emoji-dit" / "transformer", torch_dtype=torch.float32).eval()
    tables = [block.norm1.emb.class_embedder.embedding_table.weight for block in theirs.transformer_blocks]
    assert not torch.equal(tables[0], tables[1])
    x, t, labels = torch.randn(2, 16, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([1, 6])
    cards = read_cards(made)
    parts = build_parts(cards["emoji-dit"], cards, torch.device("cpu"), torch.float32)
    whole = theirs(x, t, labels).sample
    for ours in (build(6, made / "emoji-dit"), parts["transformer"]):
        close(predict(ours, x, t, labels), whole, FORWARD, furthest)
        apart(predict(ours, x.roll(1, 0), t, labels), whole, FORWARD, furthest, of="another row:")


def test_an_epoch_is_every_plain_scene(subjects: list[Any], made: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(made / "emoji-mmdit" / "vae")
    pool = Latents(vae, subjects[:2], np.random.default_rng(0), tmp_path / "new" / "latents.pt")
    assert pool.latents.shape == (4, 77, 16, 16, 16) and sum(pool.weights) == pytest.approx(1)
    assert classes(subjects[:2]) == ["thing 0", "flat thing 0", "thing 1", "flat thing 1"]
    scene = every_plain_scene(1, 1)[0][5]
    mean = vae.encode(to_float([render(scene, subjects[1])])).latent_dist.mean[0]
    wanted = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert (pool.latents[3, 5] - wanted).pow(2).mean() < 1e-3 < 0.1 < (pool.latents[2, 5] - wanted).pow(2).mean()
    latents, labels = pool.batch(256)
    assert latents.shape == (256, 16, 16, 16) and torch.bincount(labels).min() > 30
    nearest = (latents[:, None] - pool.latents[labels]).pow(2).mean((2, 3, 4)).amin(1)
    assert nearest.max() == 0
    again = Latents(vae, [], np.random.default_rng(0), tmp_path / "new" / "latents.pt")
    assert torch.equal(again.latents, pool.latents)


def test_training_goes_on_where_it_stopped(subjects: list[Any], made: Path) -> None:
    work = made / "runs" / "dit"
    before = torch.load(work / "state.pt", weights_only=True)["step"]
    options = ("--minutes", 0.04, "--batch", 4, "--device", "cpu", "--threads", 1)
    run("train_dit", subjects[:3], *options, "--work", work, "--out", made / "emoji-dit")
    assert torch.load(work / "state.pt", weights_only=True)["step"] > before > 0
    assert (work / "loss.png").exists() and list(work.glob("grid-*.png"))


def test_a_warm_start_needs_the_same_classes(subjects: list[Any], made: Path) -> None:
    with pytest.raises(SystemExit, match="knows 6 classes, not 4"):
        run("train_dit", subjects, "--subjects", 2, "--init", made / "emoji-dit", "--work", made / "runs/other")
    assert build(6, made / "emoji-dit").config.num_embeds_ada_norm == 6
    assert TIMES == 1000
