"""Presets: prompts and settings under a name, as comparisons of models are published.

Knows nothing of bodies or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.cards.card import Card


@dataclass(frozen=True)
class Preset:
    """What fills the fields that a body leaves out."""

    prompts: tuple[str, ...]
    steps: int
    guidance: float


PRESETS = {
    "two_prompts": Preset(
        prompts=(
            "A still life on a pale wooden table: three red pears to the left of a tall blue glass bottle, "
            "a yellow lemon in front of both, a folded green cloth beneath, soft window light",
            'The front of a small bakery on a rainy evening, its painted wooden sign reads "FRESH BREAD" in white '
            "letters, warm light behind the window, reflections on the wet street",
        ),
        steps=28,
        guidance=7.0,
    )
}
"""Prompts of our own: one asks for colours and places, one for writing in the picture."""


def takes_preset(card: Card, preset: Preset) -> bool:
    """Whether a model draws prompts and its limits hold the preset's."""
    limits, longest = card.limits, max(map(len, preset.prompts))
    enough = limits.num_inference_steps >= preset.steps and limits.guidance_scale >= preset.guidance
    return not card.draws_classes and enough and limits.prompt >= longest
