"""Request: what to draw (Recipe), the condition and the seed of each image, the picture that they start from (Source),
and how to deliver them (Delivery).

All of it is validated, complete, frozen, hashable and picklable; the HTTP body is `app/jobs/body.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text condition. Guidance moves away from `negative`; None where the body has none, which is not always ""."""

    text: str
    negative: str | None = None


@dataclass(frozen=True, slots=True)
class ClassLabel:
    """A class condition: an index into the card's labels. Guidance moves away from the null class."""

    index: int


Condition = Prompt | ClassLabel


class Pass(NamedTuple):
    """What one pass through the network is conditioned on.

    condition: None is no text at all, which is zeros and not the text "". numbers: the sizes and scores that an SDXL
    network takes beside its text. clip_skip: how many of the last layers of a CLIP are left out.
    """

    condition: Condition | None
    numbers: tuple[float, ...] = ()
    clip_skip: int = 0


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One image of a request: its condition and the seed of all its noise."""

    condition: Condition
    seed: int


class Key(NamedTuple):
    """What rows must have in common to share a forward, and nothing else: each further field is a reason not to."""

    model: str
    width: int
    height: int
    text_length: int

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class SkipGuidance:
    """Skip-layer guidance of a scale, on those steps i, counted from 0, with start * steps < i < stop * steps."""

    scale: float
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Guidance:
    """What moves a picture towards its condition.

    scale: w in out = uncond + w (cond - uncond), which takes a second pass and has no effect at 1 or less.
    embedded: the scale that a network with embedded guidance (FLUX.1-dev) takes as an input, None for other networks.
    """

    scale: float = 1.0
    embedded: float | None = None
    skip: SkipGuidance | None = None

    @property
    def guided(self) -> bool:
        """Whether each line takes a second pass."""
        return self.scale > 1


class Framing(NamedTuple):
    """The photograph that an SDXL picture is to look cut from, in pixels (Podell et al. 2023, arXiv:2307.01952, 2.2).

    original, target: (height, width) of the photograph and of the cut. crop: (top, left) of the cut.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


class Refiner(NamedTuple):
    """A second model that draws the last part of a picture. switch_at: the share of the noise process before it."""

    model: str
    switch_at: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a picture beside its condition and seed; hence also its batch key and its cost.

    width, height: pixels. text_length: tokens that the longest text encoder is padded to, 0 for a class model.
    strength: the share of the steps that run, from the source; None draws from noise alone. source: a digest of the
    source. masked: whether that has a mask. adapters: names with their weights, sorted, none of them 0; those of the
    model, not of its refiner. grid: the noise levels that the sampler walks, "" for those of the card's schedule.
    """

    model: str
    width: int
    height: int
    sampler: str
    steps: int
    guidance: Guidance
    text_length: int
    strength: float | None = None
    source: str = ""
    masked: bool = False
    adapters: tuple[tuple[str, float], ...] = ()
    grid: str = ""
    clip_skip: int = 0
    framing: Framing | None = None
    refiner: Refiner | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that draw by this recipe, in order."""
        return (self.model, self.refiner.model) if self.refiner else (self.model,)

    @property
    def key(self) -> Key:
        """The key of the rows of this recipe, until they switch to its refiner."""
        return Key(self.model, self.width, self.height, self.text_length)

    def skipping(self, lines: int, started: int = 0) -> range:
        """Lines of its table, of so many, that take a pass more, for skip-layer guidance. Heun has two lines a step.

        started: the step that the table starts with. The share of the steps is of all of them, those before it too.
        """
        skip, each = self.guidance.skip, -(-lines // (self.steps - started))
        if skip is None or not skip.scale or not self.guidance.guided:
            return range(0)
        first, end = math.floor(skip.start * self.steps) + 1, math.ceil(skip.stop * self.steps)
        return range(max(0, first - started) * each, max(0, min((end - started) * each, lines)))

    def passes(self, lines: int, started: int = 0) -> int:
        """Passes through the network of one image with so many lines in its table, as `skipping` takes them."""
        return lines * (2 if self.guidance.guided else 1) + len(self.skipping(lines, started))


@dataclass(frozen=True, slots=True)
class Source:
    """The picture that the images of a request start from, at their size.

    pixels: uint8 [height, width, 3]. mask: uint8 [height, width], or None: 0 keeps the source there, everything above
    is drawn anew; below 255 the file mixes the two.
    """

    pixels: bytes
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """Who asks and how the request is answered; none of it changes a picture.

    tenant, weight: the API key's name, and its share of the device beside other keys'. priority: breaks ties.
    deadline: on the clock of `time.monotonic()`, or None. previews: partial images wanted for each image.
    progress: whether every step is reported. keep_latents: whether the results carry their final latents. arrived: when
    the server took it, on the same clock; None is when the engine gets it. done: indices of images that an earlier
    engine process answered. apart: indices with the line, as in `Row.apart`, at which a process died.
    """

    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    deadline: float | None = None
    previews: int = 0
    progress: bool = False
    keep_latents: bool = False
    arrived: float | None = None
    done: frozenset[int] = frozenset()
    apart: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """A complete request: no field is left to a default further down. Its id is unique among those in flight.

    source: present exactly where the recipe has a strength.
    """

    id: str
    recipe: Recipe
    images: tuple[ImageSpec, ...]
    delivery: Delivery = Delivery()
    source: Source | None = None
