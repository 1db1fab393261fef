"""Start the text encoders: each learns to tell what a caption says, before a network reads what it writes.

Subject, colour, size, place and style are told from the encoder's summary by linear heads,
which are thrown away. (SD3's encoders were trained on tasks of their own too, and then frozen: Esser et al. 2024.)
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from data import COLOURS, PLACES, STYLES, Scene, Subject, caption, draw_scene, load_subjects
from loop import Training, parse
from text import CLIP_WIDTHS, T5_WIDTH, Text, train_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


def facts(scene: Scene) -> tuple[int, ...]:
    """Subject, colour, size, place and style as classes; colour, place and style are 0 where none is named."""
    colour = 1 + list(COLOURS).index(scene.colour) if scene.colour_named else 0
    place = 1 + PLACES.index(scene.place) if scene.place else 0
    style = 1 + scene.drawing if scene.style_named else 0
    return scene.subject, colour, int(scene.small), place, style


class Readers(nn.Module):
    """For each encoder, five linear heads on its summary: CLIP's projected state, the mean of T5's states."""

    def __init__(self, subjects: int) -> None:
        super().__init__()
        sizes = (subjects, 1 + len(COLOURS), 2, 1 + len(PLACES), 1 + len(STYLES))
        widths = (*CLIP_WIDTHS, T5_WIDTH)
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(width, size) for size in sizes) for width in widths)

    def forward(self, summaries: list[Tensor]) -> list[list[Tensor]]:
        return [[head(summary) for head in heads] for heads, summary in zip(self.heads, summaries, strict=True)]


def summaries(text: Text, captions: list[str]) -> list[Tensor]:
    first, second, third = text.ids(captions, next(text.parameters()).device)
    states = text.encoders[2](third)[0]
    return [text.encoders[0](first).text_embeds, text.encoders[1](second).text_embeds, states.mean(1)]


def loss_of(both: nn.ModuleDict, captions: list[str], targets: Tensor) -> Tensor:
    logits, targets = both["readers"](summaries(both["text"], captions)), targets.to(next(both.parameters()).device)
    return torch.stack([F.cross_entropy(one, targets[:, i]) for heads in logits for i, one in enumerate(heads)]).sum()


@torch.no_grad()
def score(both: nn.ModuleDict, subjects: list[Subject], count: int = 512) -> str:
    """Share of facts told right by each encoder, on fresh captions."""
    captions, targets = batch(np.random.default_rng(1), subjects, count)
    logits = both["readers"](summaries(both["text"], captions))
    right = [[(one.argmax(1).cpu() == targets[:, i]).float().mean().item() for i, one in enumerate(h)] for h in logits]
    return " ".join("/".join(f"{value:.2f}" for value in row) for row in right)


def batch(rng: np.random.Generator, subjects: list[Subject], count: int) -> tuple[list[str], Tensor]:
    scenes = [draw_scene(rng, subjects) for _ in range(count)]
    captions = [caption(rng, scene, subjects[scene.subject]) for scene in scenes]
    return captions, torch.tensor([facts(scene) for scene in scenes])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("models/emoji-mmdit"))


def main() -> None:
    args = parse(__doc__, "text", options, minutes=20, rate=2e-3, batch=128)
    everything = load_subjects(args.cache)
    train_tokenizers(everything, args.out)
    subjects = everything[: args.subjects or None]
    torch.manual_seed(0)
    both = nn.ModuleDict({"text": Text(args.out), "readers": Readers(len(subjects))}).to(args.device)
    training = Training(both, args)

    def losses() -> list[partial[Tensor]]:
        parts = (batch(training.rng, subjects, training.share) for _ in range(args.threads))
        return [partial(loss_of, both, *part) for part in parts]

    def publish() -> None:
        tqdm.write(f"right (subject/colour/size/place/style): {score(both, subjects)}")
        both["text"].save(args.out)

    training.run(losses, publish)


if __name__ == "__main__":
    main()
