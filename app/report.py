"""Reports of the engine: plain, frozen, picklable facts that cross the process border upward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from app.errors import InstepError

Phase = Literal["source", "encode", "denoise", "decode"]
"""What a work does: the VAE encodes a source, text encoders a prompt; a forward; the VAE decodes."""

State = Literal["absent", "loading", "ready", "failed"]

Place = tuple[str, int, int]
"""Where a row stands: the id of its request, its index, and the lines that it has run; -1 before its first encode."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one image's time went, in seconds; `steps` are lines run, `shared` the mean rows of its forwards.

    queue: its waits, also for a refiner. encode: its texts, for every model that draws it.
    """

    queue: float
    encode: float
    denoise: float
    decode: float
    steps: int
    shared: float


@dataclass(frozen=True, slots=True)
class Tick:
    """One unit of work done: a forward of `passes` (of which `padding` were padding) for `rows` rows.

    cap, rate: the passes that pay at once, and the seconds that each takes then, as the engine has learned so far.
    width, height: pixels of its images. out_of_memory: forwards of it that were split because they did not fit; where
    there are no rows, the first forward of this size did not, which tried it alone.
    text_hits, text_misses: texts that each text encoder had encoded before, or encoded now.
    """

    model: str
    phase: Phase
    rows: int
    passes: int
    padding: int
    cap: int
    seconds: float
    running: int
    waiting: int
    width: int = 0
    height: int = 0
    out_of_memory: int = 0
    text_hits: int = 0
    text_misses: int = 0
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A row finished line `step` of `steps`; sent only for requests that ask."""

    request_id: str
    index: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The predicted clean image of a running row. pixels: uint8 [height, width, 3]."""

    request_id: str
    index: int
    partial: int
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Result:
    """One finished image. pixels: uint8 [height, width, 3]; latents: float32 [C, h, w] when asked for."""

    request_id: str
    index: int
    seed: int
    pixels: np.ndarray
    timings: Timings
    latents: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """The request failed as a whole; its other rows are dropped."""

    request_id: str
    error: InstepError


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model's state changed. seconds: how long the load took; rates: seconds a pass by "WxH"."""

    model: str
    state: State
    detail: str = ""
    seconds: float = 0.0
    device_bytes: int = 0
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evicted:
    """A part of a model left the device: to the host's memory, or away, where only its files are. bytes: its size."""

    model: str
    part: str
    to: Literal["host", "away"]
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory that an engine process holds now, in bytes by kind; sent whenever it changes.

    weights, slots and text (encoded prompts) are on the device, parked in the host's memory; budget is what weights may
    take of the device.
    """

    bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Announce:
    """The engine process enters a phase that may be silent for at most `seconds`; longer is a hang."""

    phase: str
    seconds: float


Report = Tick | Progress | Preview | Result | Failure | ModelState | Evicted | Memory | Announce
