"""The tables of the pages that are made from the code: `python -m tests.readme` rewrites them, a test compares.

A table is between `<!-- made: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_origin

from app.samplers.table import SAMPLERS, valid_pairs
from app.settings import Settings

ROOT = Path(__file__).parent.parent
FILES = tuple(ROOT / name for name in ("README.md", "app/README.md", "deploy/README.md", "docs/api.md"))
BLOCK = re.compile(r"(<!-- made: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def settings_table() -> str:
    """Every setting with its default, kind and description."""
    lines = ["| flag | environment | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        choices = get_args(field.annotation)
        kind = f" ({', '.join(choices)})" if choices and get_origin(field.annotation) is not None else ""
        default = f"`{field.default}`" if str(field.default) else "empty"
        flag = f"`--{name.replace('_', '-')}`"
        meaning = str(field.description).replace("<", "\\<")
        lines.append(f"| {flag} | `INSTEP_{name.upper()}` | {default} | {meaning}{kind} |")
    return "\n".join(lines) + "\n"


def solvers_table() -> str:
    """Which sampler goes with which prediction."""
    predictions = tuple(dict.fromkeys(prediction for _, prediction in valid_pairs()))
    lines = [f"| sampler | {' | '.join(predictions)} |", f"| --- | {' | '.join('---' for _ in predictions)} |"]
    for name in SAMPLERS:
        marks = ("yes" if (name, prediction) in valid_pairs() else "" for prediction in predictions)
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def samplers_line() -> str:
    """The samplers of each prediction, in one line."""
    by_names: dict[tuple[str, ...], list[str]] = {}
    for prediction in dict.fromkeys(prediction for _, prediction in valid_pairs()):
        names = tuple(name for name, other in valid_pairs() if other == prediction)
        by_names.setdefault(names, []).append(prediction)
    parts = (f"{', '.join(kinds)}: {', '.join(f'`{name}`' for name in names)}" for names, kinds in by_names.items())
    return f"{'; '.join(parts)}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "solvers": solvers_table,
    "samplers": samplers_line,
}


def remade(text: str) -> str:
    """The text with every made table as the code has it now."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(remade(file.read_text(encoding="utf-8")), encoding="utf-8")
