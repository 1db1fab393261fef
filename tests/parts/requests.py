"""Requests for tests, from flat facts: `flat` makes one, `changed` makes another of it; and `refused`, the errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import pytest

from app.errors import Code, InstepError
from app.request import Condition, Delivery, Guidance, ImageSpec, Pass, Recipe, Request, SkipGuidance

PARTS = {name: {field.name for field in fields(kind)} for name, kind in (("recipe", Recipe), ("delivery", Delivery))}


def passes(conditions: Iterable[Condition]) -> list[Pass]:
    """A pass for each of these conditions, with nothing beside it."""
    return [Pass(one) for one in conditions]


def flat(
    id: str,
    model: str,
    images: tuple[ImageSpec, ...],
    width: int,
    height: int,
    sampler: str,
    steps: int,
    guidance: float,
    text_length: int,
    *,
    guided: bool = True,
    embedded: float | None = None,
    skip: SkipGuidance | None = None,
    adapters: tuple[tuple[str, float], ...] = (),
    **delivery: Any,
) -> Request:
    """guided: False takes the guidance away, whatever its scale."""
    how = Guidance(guidance if guided else min(guidance, 1.0), embedded, skip)
    recipe = Recipe(model, width, height, sampler, steps, how, text_length, adapters=adapters)
    return Request(id, recipe, images, Delivery(**delivery))


def changed(request: Request, **changes: Any) -> Request:
    """The request with other facts: of itself, its recipe, its delivery; guidance is a scale."""
    if "guidance" in changes:
        changes["guidance"] = replace(request.recipe.guidance, scale=changes["guidance"])
    if "skip" in changes:
        changes["guidance"] = replace(request.recipe.guidance, skip=changes.pop("skip"))
    for part, names in PARTS.items():
        own = {name: changes.pop(name) for name in names & changes.keys()}
        changes[part] = replace(getattr(request, part), **own)
    return replace(request, **changes)


def refused(code: Code, match: str | None = None) -> pytest.RaisesExc[InstepError]:
    """A context in which an error with this code is raised."""
    return pytest.RaisesExc(InstepError, match=match, check=lambda error: error.code == code)
