"""Traffic: requests of several kinds of work at random times, the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from app.cards.card import Card
from app.samplers.table import compile_table, valid_samplers

Mix = Literal["mixed", "homogeneous"]

KINDS: Mapping[Mix, Sequence[tuple[int, bool, int]]] = {
    "mixed": (
        (4, False, 0), (6, False, 2), (8, False, 0), (12, False, 1), (20, False, 0), (28, False, 2), (50, False, 0),
        (4, True, 0), (8, True, 2), (14, True, 1), (20, True, 0), (28, True, 0), (50, True, 2),
    ),
    "homogeneous": ((20, True, 0),),
}  # fmt: skip
"""(steps, guided, index of one of the model's samplers), all equally likely."""

SAMPLERS = {
    "dit": ("ddim", "ddpm", "dpmpp_2m"),  # DiTPipeline does not scale its first noise, as the others need
    "sd3": ("flow_euler", "flow_heun", "flow_dpmpp_2m"),
    "flux": ("flow_euler", "flow_dpmpp_2m"),  # FluxPipeline gives sigmas, which the Heun does not take
}
"""What is drawn of each family: the samplers that diffusers' pipelines have too, so that they can be compared."""

CLASSES = {"short": 8, "medium": 40, "long": 10_000}
"""Most passes of each class; a guided line is two."""

PROMPTS = (
    "a red apple on a blue background", "a yellow star", "a green tree", "an orange cat", "a purple umbrella",
    "a slice of pizza", "a red car", "a brown dog", "a pink flower", "a white snowman", "a blue heart", "the sun",
)  # fmt: skip


class Arrival(NamedTuple):
    """One request. at: seconds from the start. kind: its class by length. body: of POST /v1/images/generations."""

    at: float
    kind: str
    body: dict[str, Any]

    @property
    def work(self) -> str:
        """A name for the work of the request: requests that differ only in what they show have the same name."""
        shown = ("prompt", "negative_prompt", "class_label", "seed")
        return json.dumps({name: value for name, value in sorted(self.body.items()) if name not in shown})


def arrivals(card: Card, mix: Mix, rate: float, seed: int) -> Iterator[Arrival]:
    """Draw requests for one model without end, the same for the same seed.

    They arrive as a Poisson process. rate: mean requests a second.
    """
    dice = random.Random(seed)
    at = 0.0
    while True:
        at += dice.expovariate(rate)
        yield Arrival(round(at, 6), *_draw(card, dice.choice(KINDS[mix]), dice))


def kinds(card: Card, mix: Mix) -> list[Arrival]:
    """One request of every kind of work."""
    return [Arrival(0.0, *_draw(card, kind, random.Random(0))) for kind in KINDS[mix]]


def _draw(card: Card, kind: tuple[int, bool, int], dice: random.Random) -> tuple[str, dict[str, Any]]:
    """The class and the body of one request."""
    samplers = [name for name in valid_samplers(card.schedule) if name in SAMPLERS[card.family]]
    steps, guided, which = kind
    steps = min(steps, card.limits.num_inference_steps)
    first = samplers.index(card.defaults.sampler) if card.defaults.sampler in samplers else 0
    sampler = samplers[(first + which) % len(samplers)]
    lines = compile_table(card.schedule, sampler, steps, tokens=1).lines
    passes = lines * (2 if guided and card.guidance == "cfg" else 1)
    shown: dict[str, Any] = {"prompt": dice.choice(PROMPTS)}
    if card.draws_classes:
        shown = {"class_label": dice.randrange(len(card.labels))}
    body = {
        "model": card.id, **shown, "sampler": sampler, "num_inference_steps": steps,
        "guidance_scale": min(4.0, card.limits.guidance_scale) if guided else 0.0, "seed": dice.randrange(2**31),
    }  # fmt: skip
    return next(kind for kind, most in CLASSES.items() if passes <= most), body
