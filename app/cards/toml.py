"""Toml: a value of a card as it is written into a card.toml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def to_toml(value: Any) -> str:
    """A value of a card as TOML, tables in one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {to_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
