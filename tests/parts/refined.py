"""Three pairs of tiny models, the second of which refines what the first has drawn; and requests for both."""

from __future__ import annotations

from pathlib import Path

from app.cards.card import Card, Text
from app.cards.cards import read_card, read_cards
from app.request import Refiner, Request
from tests.parts.requests import changed
from tests.parts.tiny import write_dit, write_sd3
from tests.parts.tiny_unets import write_unet

PAIRS = {"tiny-sd3": "sd3-refiner", "tiny-dit": "dit-refiner", "tiny-sdxl": "tiny-refiner"}
"""The models with their refiners."""


def pairs(tiny: Path, folder: Path) -> dict[str, Card]:
    """The cards of the pairs: a refiner has a network of its own, the VAE of the first model, and a shorter T5.

    That of tiny-sdxl is another kind of network, as the true one is.
    """
    write_sd3(folder / PAIRS["tiny-sd3"], seed=60)
    write_dit(folder / PAIRS["tiny-dit"], seed=70)
    write_unet(folder / "tiny-sdxl", "sdxl")
    write_unet(folder / "tiny-refiner", "refiner")
    found = {name: card for name, card in read_cards(tiny).items() if name in PAIRS}
    for name in found.copy():
        facts = {"id": PAIRS[name], "aliases": (), "components": {"vae": f"{name}/vae"}, "text": Text(clip=24, t5=16)}
        found[PAIRS[name]] = read_card(folder / PAIRS[name] / "card.toml").model_copy(update=facts)
    return found | {name: read_card(folder / name / "card.toml") for name in ("tiny-sdxl", PAIRS["tiny-sdxl"])}


def refined(request: Request, switch_at: float = 0.8, model: str = "") -> Request:
    """The request with a refiner, that of its model where none is named."""
    return changed(request, refiner=Refiner(model or PAIRS[request.recipe.model], switch_at))
