"""Rows and prompts for tests of the cache of encoded prompts; the plain encode, and the plain rule of what is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from app.engine.row import Row
from app.families.base import Conditions, Family
from app.families.text import Encoder
from app.request import Condition, ImageSpec, Key, Prompt
from tests.parts.requests import flat, passes

numbers = itertools.count()


def row(condition: Condition | str, model: str = "tiny-sd3", *, guided: bool = False, length: int = 24) -> Row:
    spec = ImageSpec(Prompt(condition) if isinstance(condition, str) else condition, 0)
    asked = flat("r", model, (spec,), 32, 32, "flow_euler", 4, 4.0, length, guided=guided)
    return Row(asked, 0, Key(model, 32, 32, length), 4, 0.0, next(numbers))


def anew(family: Family, texts: list[str], length: int = 24, batch: int | None = None) -> Conditions:
    return family.encode(passes([Prompt(text) for text in texts]), length, batch)


def equal(ours: Conditions, theirs: Conditions) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def encoders(family: Any) -> list[Encoder]:
    return [one for one in (*getattr(family, "clips", ()), family.t5) if one]


@contextmanager
def forwards(family: Family) -> Iterator[list[int]]:
    """How many texts each forward of a text encoder was for."""
    seen: list[int] = []
    hooks = [
        each.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        for each in encoders(family)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


class Plain:
    """The rule of the cache, on a list: names in order of use, and what must leave."""

    def __init__(self, budget: int) -> None:
        self.budget, self.names, self.empty = budget, [], {}  # type: ignore[var-annotated]
        self.hits = self.misses = 0

    def ask(self, encoder: Encoder, texts: list[str], length: int, size: int) -> None:
        for text in dict.fromkeys(texts):
            name = (encoder, text, length, size)
            self.hits, self.misses = self.hits + (name in self.names), self.misses + (name not in self.names)
            self.names = [other for other in self.names if other != name] + [name]
            if not text:
                self.empty[encoder] = name
        for name in [name for name in self.names if name not in self.empty.values()]:
            if self.bytes > self.budget:
                self.names.remove(name)

    @property
    def bytes(self) -> int:
        return sum(name[-1] for name in self.names)
