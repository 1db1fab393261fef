"""The text encoders' start, and the MMDiT's start from a DiT, against the DiT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bound import Levels
from data import Scene
from text import Text
from torch.nn import functional as F
from train_dit import build as build_dit
from train_mmdit import build, kept_encoders
from train_text import Readers, batch, facts, summaries
from warm import KEPT, copy_stream, fit, match_norms, start_from, times_of

from app.card import read_cards
from app.cli.models import check_folder
from app.families.dit import predict
from app.request import Prompt
from tests.recipes.conftest import run
from tests.recipes.test_distill_turbo import family


@pytest.fixture(scope="module")
def dit(made: Path) -> torch.nn.Module:
    """A DiT of which no weight is zero."""
    model = build_dit(12, made / "emoji-dit")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def test_facts_are_what_the_caption_says(subjects: list[Any]) -> None:
    plain = Scene(3, "white", False, False, None, 0, False, 64, 0, 0)
    assert facts(plain) == (3, 0, 0, 0)
    assert facts(Scene(3, "white", True, True, "bottom", 0, False, 26, 0, 0)) == (3, 1, 1, 4)
    captions, targets = batch(np.random.default_rng(0), subjects, 40)
    for text, (subject, colour, small, place) in zip(captions, targets.tolist(), strict=True):
        said = text.lower()
        assert subjects[subject].name in said.rstrip(".")
        assert (colour > 0) == (" on " in f" {said}" or "background" in said)
        assert (small == 1) == ("small" in said)
        assert (place > 0) == any(word in said for word in ("left", "right", "top", "bottom"))


def test_the_encoders_learn_to_tell_captions_apart(subjects: list[Any], made: Path) -> None:
    """A linear reader, fitted on their summaries, names the subjects of other captions."""
    text = Text(made / "emoji-small", made / "emoji-small").eval()
    with torch.no_grad():
        (known, labels), (new, wanted) = (batch(np.random.default_rng(seed), subjects, 256) for seed in (1, 2))
        given, asked = (torch.cat(summaries(text, captions), dim=1) for captions in (known, new))
    assert given.shape[1] == sum(head[0].in_features for head in Readers(12).heads)
    found = torch.linalg.lstsq(given, F.one_hot(labels[:, 0], 12).float()).solution
    assert ((asked @ found).argmax(1) == wanted[:, 0]).float().mean() > 0.5


def test_an_encoder_is_always_there() -> None:
    kept = kept_encoders(5000, torch.device("cpu"))
    assert kept.sum(1).min() == 1
    assert torch.allclose(kept.mean(0), torch.tensor([0.9, 0.9, 0.75]), atol=0.03)


def test_the_image_stream_is_the_dits(dit: Any) -> None:
    """Patches, every block's modulation, attention and feed-forward, and the way out, each run in both networks."""
    model = build().eval()
    with torch.no_grad():
        copy_stream(model, dit)
        width = dit.config.attention_head_dim * dit.config.num_attention_heads
        x, emb = torch.randn(2, 16, width), torch.randn(2, width)
        latents = torch.randn(2, 16, 8, 8)
        assert torch.allclose(model.pos_embed.proj(latents), dit.pos_embed.proj(latents), atol=1e-5)
        for block, index in zip(model.transformer_blocks, KEPT, strict=True):
            own = dit.transformer_blocks[index]
            ours, theirs = block.norm1.linear(F.silu(emb)), own.norm1.linear(F.silu(emb))
            assert torch.equal(ours, theirs)
            assert torch.allclose(block.ff(x), own.ff(x), atol=1e-4)
            assert torch.equal(block.attn.to_v(x), own.attn1.to_v(x))
        shift, scale = dit.proj_out_1(F.silu(emb)).chunk(2, dim=1)
        plain = dit.proj_out_2(dit.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        plain = plain.unflatten(2, (2, 2, 32))[..., :16]
        ours = model.proj_out(model.norm_out(x, emb)).unflatten(2, (2, 2, 16))
        assert torch.allclose(ours, plain, atol=1e-4)


def test_queries_are_as_long_as_the_dits(dit: Any) -> None:
    model = build().eval()
    with torch.no_grad():
        copy_stream(model, dit)
        match_norms(model, dit)
    seen: list[torch.Tensor] = []
    linear = dit.transformer_blocks[KEPT[-1]].attn1.to_q
    hook = linear.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        predict(dit, torch.randn(256, 16, 8, 8), torch.randint(1000, (256,)), torch.randint(12, (256,)))
        hook.remove()
        ours = model.transformer_blocks[-1].attn.norm_q(seen[0].unflatten(2, (7, -1)))
    assert float(ours.pow(2).mean().sqrt()) == pytest.approx(float(seen[0].pow(2).mean().sqrt()), rel=0.1)


def test_a_flows_time_is_the_step_that_is_as_noisy(dit: Any) -> None:
    model = build().eval()
    given, wanted = times_of(model, dit)
    snr = Levels("cpu")("snr", torch.arange(1000)).flatten()
    flow = torch.linspace(0.001, 0.999, 4096)
    embed = dit.transformer_blocks[0].norm1.emb
    for at in (1200, 2048, 3000):
        assert torch.allclose(given[at], model.time_text_embed.time_proj(flow[at : at + 1] * 1000)[0], atol=1e-4)
        step = int((snr.log() - 2 * ((1 - flow[at]) / flow[at]).log()).abs().argmin())
        near = torch.stack([embed.timestep_embedder(embed.time_proj(torch.tensor([s])))[0] for s in (step, step + 1)])
        assert (near - wanted[at]).abs().amax(1).min() < 1e-5


def test_fit_finds_a_map_that_there_is() -> None:
    torch.manual_seed(0)
    given, true, module = torch.randn(2000, 8), torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    fit(module, given, true(given).detach())
    assert (module.weight - true.weight).abs().max() < 1e-2


def test_another_number_of_blocks_is_refused(subjects: list[Any], dit: Any) -> None:
    model = build()
    model.transformer_blocks = model.transformer_blocks[:2]
    with pytest.raises(ValueError, match="2 blocks, not 4"):
        start_from(model, dit, None, subjects)  # type: ignore[arg-type]


def test_the_card_loads_and_encodes_as_the_recipe_does(made: Path) -> None:
    assert check_folder(made, 2)["emoji-small"] == ("ok", "8 parts")
    card = read_cards(made)["emoji-small"]
    text = Text(made / "emoji-small", made / "emoji-small").eval()
    assert (card.text.clip, card.text.t5) == tuple(t.model_max_length for t in text.tokenizers[1:])
    with torch.no_grad():
        ours, pooled = text(["a small thing 3 on blue"], torch.ones(1, 3))
        theirs = family(made, "emoji-small").encode([Prompt("a small thing 3 on blue")], card.text.t5)
    assert torch.allclose(ours, theirs["text"], atol=1e-5) and torch.allclose(pooled, theirs["pooled"], atol=1e-5)


def test_training_goes_on_and_does_not_start_warm_again(subjects: list[Any], made: Path) -> None:
    work, out = made / "runs" / "mmdit", made / "emoji-small"
    before = torch.load(work / "state.pt", weights_only=True)["step"]
    options = ("--minutes", 0.04, "--batch", 4, "--device", "cpu", "--pool", 64, "--threads", 1)
    run("train_mmdit", subjects, *options, "--like", made / "nowhere", "--work", work, "--out", out)
    assert torch.load(work / "state.pt", weights_only=True)["step"] > before > 0
    assert (work / "loss.png").exists() and list(work.glob("grid-*.png"))
