"""What a user asked for: validated, complete, frozen, picklable.

Knows nothing of HTTP bodies (`app/jobs/body.py`) and nothing of tensors (`app/families`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text condition. `negative` is the text that guidance moves away from; the empty string by default."""

    text: str
    negative: str = ""


@dataclass(frozen=True, slots=True)
class ClassLabel:
    """A class condition: an index into the card's labels. Guidance moves away from the null class."""

    index: int


Condition = Prompt | ClassLabel


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One image of a request: its condition and the seed of all its noise."""

    condition: Condition
    seed: int


@dataclass(frozen=True, slots=True)
class SkipGuidance:
    """Skip-layer guidance of a request: its scale, and the share of the steps between which it acts."""

    scale: float
    start: float
    stop: float

    def steps(self, steps: int) -> range:
        """Steps of so many on which it acts: those i with start * steps < i < stop * steps, counted from 0."""
        return range(math.floor(self.start * steps) + 1, math.ceil(self.stop * steps))


@dataclass(frozen=True, slots=True)
class Request:
    """A complete request: no field is left to a default further down.

    width, height: pixels. guidance: the scale w in out = uncond + w (cond - uncond), used only when `guided`.
    deadline: on the clock of `time.monotonic()`, or None. previews: partial images wanted for each image.
    embedded: the scale that a network with embedded guidance (FLUX.1-dev) is given, None for other networks.
    tenant, weight: the API key's name, and its share of the device beside other keys'.
    """

    id: str
    model: str
    images: tuple[ImageSpec, ...]
    width: int
    height: int
    sampler: str
    steps: int
    guided: bool
    guidance: float
    text_length: int
    embedded: float | None = None
    skip: SkipGuidance | None = None
    priority: int = 0
    deadline: float | None = None
    previews: int = 0
    progress: bool = False
    keep_latents: bool = False
    tenant: str = ""
    weight: float = 1.0

    def skipping(self, lines: int) -> range:
        """Lines of its table, of so many, that take a pass more, for skip-layer guidance. Heun has two lines a step."""
        if self.skip is None or not self.skip.scale or not self.guided:
            return range(0)
        acts, each = self.skip.steps(self.steps), -(-lines // self.steps)
        return range(acts.start * each, min(acts.stop * each, lines))

    def passes(self, lines: int) -> int:
        """Passes through the network that one image takes, whose table has so many lines."""
        return lines * (2 if self.guided else 1) + len(self.skipping(lines))
