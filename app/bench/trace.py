"""Traces: who asks for what and when, drawn or read from a file, so that any server can be measured with the same."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from app.cards.card import Card
from app.errors import InvalidValue
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
    """at: seconds from the start. body: of POST /v1/images/generations. deadline: seconds that it may take, or None."""

    at: float
    kind: str
    body: dict[str, Any]
    deadline: float | None = None

    @property
    def work(self) -> str:
        """A name for what the body asks of the device: requests that differ in what they show have one name."""
        shown = ("prompt", "negative_prompt", "class_label", "seed")
        return json.dumps({name: value for name, value in sorted(self.body.items()) if name not in shown})


@dataclass(frozen=True)
class Trace:
    """facts: name, seconds, rate, seed and classes, as they were recorded. Arrivals are in order of time."""

    facts: dict[str, Any]
    arrivals: tuple[Arrival, ...]

    @property
    def rate(self) -> float:
        """Mean requests a second."""
        return len(self.arrivals) / float(self.facts["seconds"])

    def of(self, model: str) -> Trace:
        """The same requests for another model."""
        return Trace(self.facts, tuple(one._replace(body={**one.body, "model": model}) for one in self.arrivals))

    def at_rate(self, rate: float, seconds: float) -> list[Arrival]:
        """Arrivals of the first `seconds`, all times scaled to this mean rate; the trace repeats when it ends.

        Raises InvalidValue when nobody comes in that time.
        """
        length, scale = float(self.facts["seconds"]), self.rate / rate
        repeated = (one._replace(at=scale * (turn * length + one.at)) for turn in count() for one in self.arrivals)
        found = list(takewhile(lambda one: one.at < seconds, repeated))
        if not found:
            raise InvalidValue(f"seconds: nobody comes in {seconds:g} s", param="seconds")
        return found

    def first(self, number: int) -> list[Arrival]:
        """This many arrivals in order, from the start again when the trace ends."""
        return [self.arrivals[index % len(self.arrivals)] for index in range(number)]

    def kinds(self) -> dict[str, Arrival]:
        """One arrival of every kind of work, by its name."""
        found: dict[str, Arrival] = {}
        for one in self.arrivals:
            found.setdefault(one.work, one)
        return found

    def write(self, file: Path) -> None:
        """Write a line of facts, then a line a request. Raises OSError."""
        lines = [self.facts, *({"at": a, "class": k, "body": b, "deadline": d} for a, k, b, d in self.arrivals)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def record(card: Card, name: Mix, rate: float, seconds: float, seed: int) -> Trace:
    """Draw arrivals of a Poisson process for one model, the same for the same seed. rate: requests a second.

    Raises InvalidValue when nobody comes in that time.
    """
    dice = random.Random(seed)
    arrivals = []
    at = dice.expovariate(rate)
    while at < seconds:
        kind, body = _draw(card, name, dice)
        arrivals.append(Arrival(round(at, 6), kind, body))
        at += dice.expovariate(rate)
    if not arrivals:
        raise InvalidValue(f"nobody comes in {seconds:g} s at {rate:g} requests a second", param="seconds")
    facts = {"name": name, "seconds": seconds, "rate": rate, "unit": "requests/s", "seed": seed, "classes": CLASSES}
    return Trace(facts, tuple(arrivals))


def _draw(card: Card, name: Mix, dice: random.Random) -> tuple[str, dict[str, Any]]:
    """The class and the body of one request."""
    samplers = [name for name in valid_samplers(card.schedule) if name in SAMPLERS[card.family]]
    steps, guided, which = dice.choice(KINDS[name])
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


def read(file: Path) -> Trace:
    """Read the trace of a file. Raises InvalidValue naming the first line that is not one of a trace, OSError."""
    found: list[Arrival] = []
    number = 1
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        facts = json.loads(lines[0])
        if not 0 < float(facts["seconds"]) < math.inf:
            raise ValueError("seconds")
        number = 2
        for one in map(json.loads, lines[1:]):
            found.append(_arrival(one))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidValue(f"{file}, line {number + len(found)}: not a line of a trace", param="trace") from error
    if not found:
        raise InvalidValue(f"{file}: nobody asks for anything", param="trace")
    return Trace(facts, tuple(sorted(found, key=lambda one: one.at)))


def _arrival(line: Any) -> Arrival:
    """Raises ValueError, KeyError, TypeError or AttributeError: not a line of a trace."""
    deadline = line.get("deadline")
    times = (float(line["at"]), 0.0 if deadline is None else float(deadline))
    if not all(0 <= seconds < math.inf for seconds in times):
        raise ValueError("at or deadline")
    return Arrival(times[0], str(line["class"]), dict(line["body"]), None if deadline is None else times[1])
