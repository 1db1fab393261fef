"""Field types of the request body: what each kind of value may look like, with the words an error uses.

Knows nothing of cards or of what other bounds are (`app/jobs/body.py` has both); needs no fastapi.
"""

from __future__ import annotations

import math
import secrets
from typing import Annotated, TypeVar

from pydantic import BeforeValidator

from app.errors import InvalidValue

T = TypeVar("T")

SEEDS = 2**63
"""Seeds are 0 to SEEDS - 1; image i of a request uses (seed + i) mod SEEDS."""

LONGEST = 32_000
"""Characters that a text may have: the limit of prompts that a card sets is at most this."""

MOST = 64
"""Entries that a list may have: the limit of `n` that a card sets is at most this."""

ANY_SEED = -1
"""A seed that asks for any, as A1111 and those after it write it; the same as none."""


def whole(value: object) -> int:
    """An integer, written as 4 or as 4.0; not true, not "4", not NaN. NOTE: a bool is an int in Python."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_float(value)):
        raise ValueError("expects a whole number")
    if value != int(value):
        raise ValueError("expects a whole number")
    return int(value)


def real(value: object) -> float:
    """A finite number; not true, not "4", not NaN, not 1e999."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_float(value)):
        raise ValueError("expects a finite number")
    return float(value)


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


def within(field: str, value: float | None, low: float, high: float) -> float | None:
    """The value if it is inside [low, high] or absent. NOTE: keeps an int an int: a seed does not fit in a float."""
    if value is not None and not low <= value <= high:
        raise InvalidValue(f"{field}: expects {low} to {high}", param=field)
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


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


Whole = Annotated[int, BeforeValidator(whole)]
Real = Annotated[float, BeforeValidator(real)]
Text = Annotated[str, BeforeValidator(text)]
Texts = Annotated[str | list[str], BeforeValidator(texts)]
Labels = Annotated[int | str | list[int | str], BeforeValidator(labels)]
Flag = Annotated[bool, BeforeValidator(flag)]
