"""Adapters: the LoRA files of a folder, each with an optional TOML, and which models each of them fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, Strict
from pydantic.json_schema import SkipJsonSchema

from app.samplers.schedule import Section

MOST_LORAS, STRONGEST = 8, 2.0
"""The most adapters of one picture, and the largest weight of each."""


def _weight(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -STRONGEST <= value <= STRONGEST:
        raise ValueError(f"expects a number from {-STRONGEST:g} to {STRONGEST:g}")
    return value


class Lora(Section):
    """An adapter that a request or a card asks for. weight: how much of its change is added; 0 is none of it."""

    name: Annotated[str, Strict()]
    weight: Annotated[float, BeforeValidator(_weight)] = 1.0


class Fit(Section):
    """How an adapter fits a model, by the names and shapes in its header.

    rank: the largest of its modules. modules: how many it changes, in these parts. bytes: of its weights in the file.
    unmatched: tensors of the file that this model has no place for.
    """

    rank: int
    modules: int
    parts: tuple[str, ...]
    bytes: int
    unmatched: tuple[str, ...] = ()


class Adapter(Section):
    """One LoRA file. name: that of the file. stamp: another one means a changed file. fits: by the ids of models.

    problem: why it fits none. trigger_words: what its author writes into prompts to use it.
    """

    name: str
    file: SkipJsonSchema[Path]
    stamp: SkipJsonSchema[tuple[int, ...]]
    description: str = ""
    trigger_words: tuple[str, ...] = ()
    fits: dict[str, Fit] = Field(default_factory=dict)
    problem: str = ""

    def only(self, models: Collection[str]) -> Self:
        """The same, less what it says of other models, which a `problem` names too."""
        fits = {name: fit for name, fit in self.fits.items() if name in models}
        return self.model_copy(update={"fits": fits, "problem": self.problem and "fits no model"})


def variant(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a card with a base: its own, also single `defaults` and `limits`, and the base's for all others.

    Raises ValueError for a fact that only the base may have, or its id.
    """
    if others := own.keys() - {"id", "base", "loras", "aliases", "description", "defaults", "limits"}:
        raise ValueError(f"{min(others)}: a card with a base has that of its base")
    if own.get("id", base["id"]) == base["id"]:
        raise ValueError("id: a card with a base has another one than that")
    inner = {name: {**base[name], **own[name]} for name in ("defaults", "limits") if isinstance(own.get(name), dict)}
    return {**base, "aliases": (), "description": "", **own, **inner}
