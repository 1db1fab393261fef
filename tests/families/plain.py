"""Families of tests: their parts built one after the other, and requests for them run by the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.cards.card import Card
from app.cards.cards import read_card
from app.checkpoints.parts import build_family, build_parts
from app.families.base import Family
from app.families.components import State, blank_network, build_tokenizer, fill_network
from app.pool.pool import Pool
from app.report import Result
from app.request import Condition, Delivery, Guidance, ImageSpec, Recipe, Request, SkipGuidance
from tests.parts.engine import Bench

CPU = torch.device("cpu")


def build(card: Card, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The parts of a card that shares none with another card."""
    return build_parts(card, {}, CPU, dtype)


def build_component(class_name: str, folder: Path, state: State | None, dtype: torch.dtype) -> Any:
    """A network with the weights of `state`, or a tokenizer, for which that is None."""
    if state is None:
        return build_tokenizer(class_name, folder)
    network = blank_network(class_name, folder, state)
    fill_network(network, folder, [state], CPU, dtype)
    return network


def load(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Family:
    """The family of the card in `folder`, of which `changes` replace fields."""
    card = read_card(folder / "card.toml").model_copy(update=changes)
    return build_family(card, build(card, dtype), CPU, dtype)


def ask(
    model: str,
    condition: Condition,
    *,
    steps: int,
    guidance: float,
    sampler: str,
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
    text_length: int = 24,
    name: str = "",
    embedded: float | None = None,
    skip: SkipGuidance | None = None,
) -> Request:
    """One image, of which the latent is kept."""
    recipe = Recipe(model, *size, sampler, steps, Guidance(guidance, embedded, skip), text_length)
    return Request(name, recipe, (ImageSpec(condition, seed),), Delivery(keep_latents=True))


def serve(pool: Pool, *requests: Request) -> list[Result]:
    """The results of requests that one engine got at once, in their order."""
    bench = Bench(pool).run(requests)
    assert not bench.failures, bench.failures
    return [bench.results[request.id, 0] for request in requests]


def final(result: Result) -> torch.Tensor:
    """The final latent [1, C, h, w]."""
    return torch.from_numpy(result.latents)[None]
