"""The text encoders' start, and the two halves of the MMDiT's training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import COLOURS, PLACES, STYLES, Scene
from text import Text
from torch.nn import functional as F
from train_mmdit import ABSENT, build, kept_encoders, loss_of
from train_text import Readers, batch, facts, summaries

from app.cards.cards import read_cards
from app.cli.models import check_folder
from app.request import Prompt
from tests.parts.close import FORWARD, apart, close, furthest
from tests.parts.requests import passes
from tests.recipes.conftest import run
from tests.recipes.test_distill_turbo import family

pytestmark = pytest.mark.slow


def test_facts_are_what_the_caption_says(subjects: list[Any]) -> None:
    plain = Scene(3, "white", False, False, None, 0, False, 64, 0, 0)
    assert facts(plain) == (3, 0, 0, 0, 0)
    assert facts(Scene(3, "white", True, True, "bottom", 1, False, 60, 0, 0, True)) == (3, 1, 1, 4, 2)
    captions, targets = batch(np.random.default_rng(0), subjects, 40)
    for text, (subject, colour, small, place, style) in zip(captions, targets.tolist(), strict=True):
        said = text.lower()
        assert subjects[subject].name in said.rstrip(".")
        assert (colour > 0) == any(re.search(rf"\b{name}\b", said.replace("grey", "gray")) for name in COLOURS)
        assert (small == 1) == any(word in said for word in ("small", "tiny", "little"))
        assert (place > 0) == any(word in said for word in PLACES)
        assert style == next((1 + at for at, name in enumerate(STYLES) if name in said), 0)


def test_the_encoders_learn_to_tell_captions_apart(subjects: list[Any], made: Path) -> None:
    """A linear reader, fitted on their summaries, names the subjects of other captions."""
    text = Text(made / "emoji-mmdit", made / "emoji-mmdit").eval()
    with torch.no_grad():
        (known, labels), (new, wanted) = (batch(np.random.default_rng(seed), subjects, 256) for seed in (1, 2))
        given, asked = (torch.cat(summaries(text, captions), dim=1) for captions in (known, new))
    assert given.shape[1] == sum(head[0].in_features for head in Readers(12).heads)
    found = torch.linalg.lstsq(given, F.one_hot(labels[:, 0], 12).float()).solution
    assert ((asked @ found).argmax(1) == wanted[:, 0]).float().mean() > 0.5


def test_an_encoder_is_always_there() -> None:
    kept = kept_encoders(50_000, torch.device("cpu"))
    assert kept.sum(1).min() == 1
    assert torch.allclose(kept.mean(0), 1 - torch.tensor(ABSENT), atol=0.01)


def test_the_first_half_sees_the_summaries_alone(made: Path) -> None:
    """Only through a caption's summary does it matter; the encoders stay as they are."""
    torch.manual_seed(0)
    model, text = build(made / "emoji-mmdit"), Text(made / "emoji-mmdit", made / "emoji-mmdit")
    seen: list[tuple[torch.Tensor, ...]] = []
    model.register_forward_pre_hook(
        lambda module, given, named: seen.append((named["encoder_hidden_states"], named["pooled_projections"])),
        with_kwargs=True,
    )
    captions = [f"thing {i}" for i in range(8)]
    torch.nn.init.normal_(model.proj_out.weight)
    for linear in (model.norm_out.linear, model.time_text_embed.text_embedder.linear_1):
        torch.nn.init.normal_(linear.weight, std=0.1)
    for alone in (True, False):
        loss_of(model, text, torch.randn(8, 16, 16, 16), captions, alone).backward()
    (one, _), (every, pooled) = seen
    assert one.shape[1] == 1 and one.abs().max() == 0
    assert every.shape[1] == sum(tokenizer.model_max_length for tokenizer in text.tokenizers[1:])
    assert every.abs().max() > 0 and pooled.abs().max() > 0
    assert all(parameter.grad is None for parameter in text.parameters())


def test_the_card_loads_and_encodes_as_the_recipe_does(made: Path) -> None:
    assert check_folder(made, 2)["emoji-mmdit"] == ("ok", "8 parts")
    card = read_cards(made)["emoji-mmdit"]
    text = Text(made / "emoji-mmdit", made / "emoji-mmdit").eval()
    assert (card.text.clip, card.text.t5) == tuple(t.model_max_length for t in text.tokenizers[1:])
    with torch.no_grad():
        ours, pooled = text(["a small thing 3 on blue"], torch.ones(1, 3))
        theirs = family(made, "emoji-mmdit").encode(passes([Prompt("a small thing 3 on blue")]), card.text.t5)
        other, _ = text(["a small thing 4 on blue"], torch.ones(1, 3))
    close(ours, theirs["text"], FORWARD, furthest)
    close(pooled, theirs["pooled"], FORWARD, furthest)
    apart(other, theirs["text"], FORWARD, furthest, of="another caption:")


def test_training_goes_on_where_it_stopped(subjects: list[Any], made: Path) -> None:
    work, out = made / "runs" / "mmdit", made / "emoji-mmdit"
    before = torch.load(work / "state.pt", weights_only=True)["step"]
    options = ("--minutes", 0.04, "--batch", 4, "--device", "cpu", "--pool", made / "runs/pool", "--threads", 1)
    run("train_mmdit", subjects, *options, "--work", work, "--out", out)
    assert torch.load(work / "state.pt", weights_only=True)["step"] > before > 0
    assert (work / "loss.png").exists() and list(work.glob("grid-*.png"))
