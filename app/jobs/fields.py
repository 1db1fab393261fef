"""The types of a body's fields, with the words an error uses, and `bounds`: what a card allows in them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeGuard, TypeVar

from pydantic import BeforeValidator

from app.cards.card import Card
from app.errors import InvalidValue
from app.samplers.table import most_steps, valid_samplers

T = TypeVar("T")

SEEDS = 2**63
"""Seeds are 0 to SEEDS - 1; image i of a request uses (seed + i) mod SEEDS."""

DEADLINE_LIMIT = 86_400
PRIORITY_LIMIT = 10

LONGEST = 32_000
"""Characters that a text may have: the limit of prompts that a card sets is at most this."""

MOST = 64
"""Entries that a list may have: the limit of `n` that a card sets is at most this."""

ANY_SEED = -1
"""A seed that asks for any, as A1111 and those after it write it; the same as none."""


def whole(value: object) -> int:
    """An integer, written as 4 or as 4.0; not true, not "4", not NaN."""
    if not _finite(value) or value != int(value):
        raise ValueError("expects a whole number")
    return int(value)


def real(value: object) -> float:
    """A finite number; not true, not "4", not NaN, not 1e999."""
    if not _finite(value):
        raise ValueError("expects a finite number")
    return float(value)


def _finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold. NOTE: a bool is an int in Python."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def text(value: object) -> str:
    """A string that is not too long and that UTF-8 can hold.

    NOTE: JSON can spell a lone surrogate, which no encoder downstream accepts.
    """
    if not isinstance(value, str):
        raise ValueError("expects a string")
    if len(value) > LONGEST:
        raise ValueError(f"expects at most {LONGEST} characters, not {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text") from None
    return value


def entries(value: list[T]) -> list[T]:
    """A list that is not too long, before its entries are looked at."""
    if len(value) > MOST:
        raise ValueError(f"expects at most {MOST} entries, not {len(value)}")
    return value


def texts(value: object) -> str | list[str]:
    """A string or a list of strings."""
    if not isinstance(value, str | list):
        raise ValueError("expects a string or a list of strings")
    return [text(item) for item in entries(value)] if isinstance(value, list) else text(value)


def label(value: object) -> int | str:
    """A class id or a class name."""
    if isinstance(value, str):
        return text(value)
    try:
        return whole(value)
    except ValueError:
        raise ValueError("expects a class id or a class name, or a list of them") from None


def labels(value: object) -> int | str | list[int | str]:
    """A class id or name, or a list of them."""
    return [label(item) for item in entries(value)] if isinstance(value, list) else label(value)


def flag(value: object) -> bool:
    """true or false, and nothing that merely resembles them."""
    if not isinstance(value, bool):
        raise ValueError("expects true or false")
    return value


_NOT_TAKEN = {
    "true_cfg_scale": "has no embedded guidance; its guidance_scale is classifier-free guidance",
    **dict.fromkeys(
        (f"skip_layer_guidance_{name}" for name in ("scale", "start", "stop")), "has no skip-layer guidance"
    ),
    "max_sequence_length": "draws classes and reads no text",
}
"""Fields of numbers that only some cards take, and why another refuses them."""


class Range(NamedTuple):
    """The least and the greatest value of a field, and its value where a body leaves it out."""

    low: float
    high: float
    default: float | None = None


def bounds(card: Card, sampler: str | None = None) -> dict[str, Range]:
    """The range of every numeric field of a body for this card; a field that the card does not take is absent.

    sampler: that of the body; None for the card's own. Checks, schemas and the model page are all made from this.
    """
    limits, defaults, skip = card.limits, card.defaults, card.skip_layer_guidance
    steps = most_steps(card.schedule, sampler or defaults.sampler, limits.num_inference_steps)
    found = {
        "n": Range(1, limits.n),
        "output_compression": Range(0, 100),
        "partial_images": Range(0, 3),
        "num_inference_steps": Range(1, steps, defaults.num_inference_steps),
        "guidance_scale": Range(0, limits.guidance_scale, defaults.guidance_scale),
        "seed": Range(ANY_SEED, SEEDS - 1),
        "priority": Range(-PRIORITY_LIMIT, PRIORITY_LIMIT),
        "deadline": Range(0.1, DEADLINE_LIMIT),
    }
    if card.guidance == "embedded":
        found["true_cfg_scale"] = Range(0, limits.guidance_scale, 1.0)
    if skip is not None:
        found["skip_layer_guidance_scale"] = Range(0, limits.guidance_scale, skip.scale)
        found["skip_layer_guidance_start"] = Range(0, 1, skip.start)
        found["skip_layer_guidance_stop"] = Range(0, 1, skip.stop)
    if not card.draws_classes:
        found["max_sequence_length"] = Range(1, card.text.t5, card.text.t5)
    return found


def most_steps_of(card: Card) -> dict[str, int]:
    """The most steps that the card takes with each of its samplers."""
    most = card.limits.num_inference_steps
    return {sampler: most_steps(card.schedule, sampler, most) for sampler in valid_samplers(card.schedule)}


def numbers_of(
    card: Card, sampler: str, value_of: Callable[[str], float | None], columns: int | None = None
) -> dict[str, float | None]:
    """Every numeric field that the card takes but the seed, its default where it is absent.

    value_of: what the body has in a field, None where it is absent. columns: of the grid. Raises InvalidValue.
    """
    spans = bounds(card, sampler)
    for field, reason in _NOT_TAKEN.items():
        if field not in spans and value_of(field) is not None:
            raise InvalidValue(f"{field}: {card.id} {reason}", param=field)
    _within("grid.columns", columns, spans["n"])
    return {field: _within(field, value_of(field), span) for field, span in spans.items() if field != "seed"}


def _within(field: str, value: float | None, span: Range) -> float | None:
    """The value if it is in the range, the default if it is absent. NOTE: an int stays one: a seed is no float."""
    if value is None:
        return span.default
    if not span.low <= value <= span.high:
        raise InvalidValue(f"{field}: expects {span.low} to {span.high}", param=field)
    return value


def first_seed(seed: int | None) -> int:
    """The seed of a request's first image; drawn where it is absent or ANY_SEED. Raises InvalidValue.

    NOTE: drawn below 2**32, so that a JavaScript client, whose numbers end at 2**53, can send it back.
    """
    if seed is None or seed == ANY_SEED:
        return secrets.randbelow(2**32)
    if not 0 <= seed < SEEDS:
        raise InvalidValue(f"seed: expects 0 to {SEEDS - 1}, or {ANY_SEED} for any", param="seed")
    return seed


Whole = Annotated[int, BeforeValidator(whole)]
Real = Annotated[float, BeforeValidator(real)]
Text = Annotated[str, BeforeValidator(text)]
Texts = Annotated[str | list[str], BeforeValidator(texts)]
Labels = Annotated[int | str | list[int | str], BeforeValidator(labels)]
Flag = Annotated[bool, BeforeValidator(flag)]
