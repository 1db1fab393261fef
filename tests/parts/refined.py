"""Two pairs of tiny models, the second of which refines what the first has drawn; and requests for both."""

from __future__ import annotations

from pathlib import Path

from app.cards.card import Card, Text
from app.cards.cards import read_card, read_cards
from app.request import Refiner, Request
from tests.parts.requests import changed
from tests.parts.tiny import write_dit, write_sd3

PAIRS = {"tiny-sd3": "sd3-refiner", "tiny-dit": "dit-refiner"}
"""The models with their refiners."""


def pairs(tiny: Path, folder: Path) -> dict[str, Card]:
    """The cards of the pairs: a refiner has a network of its own, the VAE of the first model, and a shorter T5."""
    write_sd3(folder / PAIRS["tiny-sd3"], seed=60)
    write_dit(folder / PAIRS["tiny-dit"], seed=70)
    found = {name: card for name, card in read_cards(tiny).items() if name in PAIRS}
    for name, refiner in PAIRS.items():
        facts = {"id": refiner, "aliases": (), "components": {"vae": f"{name}/vae"}, "text": Text(clip=24, t5=16)}
        found[refiner] = read_card(folder / refiner / "card.toml").model_copy(update=facts)
    return found


def refined(request: Request, switch_at: float = 0.8, model: str = "") -> Request:
    """The request with a refiner, that of its model where none is named."""
    return changed(request, refiner=Refiner(model or PAIRS[request.recipe.model], switch_at))
