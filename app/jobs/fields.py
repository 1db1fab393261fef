"""The types of a body's fields, each with one plain error for a value of another type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, ValidationError, WrapValidator

from app.cards.adapters import MOST_LORAS, Lora
from app.cards.card import SIDES
from app.imaging import FORMATS, Format

LONGEST, MOST = 32_000, 64
"""The most characters of a text and entries of a list. The limits `prompt` and `n` of a card are not above these."""

_DETAILS = {
    "string_too_long": "expects at most {max_length} characters",
    "too_long": "expects at most {max_length} entries, not {actual_length}",
    "string_unicode": "has a lone surrogate, which is not text",
}
WORDS = _DETAILS | {
    "extra_forbidden": "is an unknown field",
    "missing": "is required",
    "model_type": "expects a JSON object",
    "list_type": "expects a list",
    "string_type": "expects a string",
    "string_too_short": "is empty",
}
"""Our words for pydantic's errors, by type: of a value of the right type, and of all others."""


def expects(words: str) -> WrapValidator:
    """One error for a field, where pydantic has one for each type that the field may have."""

    def check(value: object, inner: Callable[[object], object]) -> object:
        try:
            return inner(value)
        except ValidationError as error:
            problems = [one for one in error.errors(include_url=False) if one["type"] in _DETAILS]
            details = [_DETAILS[one["type"]].format(**one.get("ctx", {})) for one in problems]
            raise ValueError(details[0] if details else f"expects {words}") from None

    return WrapValidator(check)


def _as_whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Integer = Annotated[int, Strict(), BeforeValidator(_as_whole)]
_Place = Annotated[int, Strict(), Field(ge=0, le=99_999), BeforeValidator(_as_whole)]
_String = Annotated[str, Strict(), Field(max_length=LONGEST)]
_Strings = Annotated[list[_String], Field(max_length=MOST)]
_Classes = Annotated[list[_Integer | _String], Field(max_length=MOST)]

Whole = Annotated[_Integer, expects("a whole number")]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False), expects("a finite number")]
Flag = Annotated[bool, Strict(), expects("true or false")]
Text = Annotated[_String, expects("a string")]
Texts = Annotated[_String | _Strings, expects("a string or a list of strings")]
Labels = Annotated[_Integer | _String | _Classes, expects("a class id or a class name, or a list of them")]
Sides = Annotated[Annotated[_String, Field(pattern=SIDES)], expects('"WxH" in pixels')]
Corner = Annotated[
    Annotated[list[_Place], Field(min_length=2, max_length=2)],
    expects("[left, top] in pixels, two whole numbers of 0 to 99999"),
]
Loras = Annotated[list[Lora], Field(max_length=MOST_LORAS)]
FileFormat = Annotated[Format, expects(f"one of {', '.join(FORMATS)}")]
Base64 = Annotated[Literal["b64_json"], expects('"b64_json"; send Accept: image/png for raw bytes')]


def without_effect(why: str, *plain: str) -> Any:
    """A field of OpenAI's clients that has no effect. plain: the values that ask for what is done anyway."""
    return Field(None, description=f"is ignored: {why}", examples=list(plain))
