"""What a prompt costs, encoded and kept: `python -m tests.bench.text [MODEL]`. Ends in one JSON line.

Conditions of one guided row with the family of a card of models/, from its prompt to tensors: with nothing kept, with
the empty prompt alone (every new prompt), and with both (a prompt asked again); in turn, the least of each counts.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

from app.cards.cards import read_cards
from app.checkpoints.parts import build_family, build_parts
from app.engine.row import Row, default_key
from app.engine.runner import encode_rows
from app.families.base import Family
from app.families.text import TextCache
from app.request import ImageSpec, Prompt
from tests.parts.requests import flat

MODELS = Path(__file__).parents[2] / "models"
TIMES, WARM_UPS = 60, 3


def fresh() -> TextCache:
    return TextCache(10**9, lambda network: 1)


def row(family: Family, text: str) -> Row:
    """A guided row of this prompt, as the card would have it."""
    card, key = family.card, default_key(family.card)
    image = ImageSpec(Prompt(text), 0)
    asked = flat("r", card.id, (image,), key.width, key.height, "flow_euler", 4, 4.0, key.text_length)
    return Row(asked, 0, key, 4, 0.0, 0)


def milliseconds(family: Family, encodings: TextCache, text: str) -> float:
    """Of the conditions and the end that no encoder sees, which is what the engine asks of a row."""
    one, begin = row(family, text), time.perf_counter()
    encode_rows(family, [one], None, encodings)
    for each in family.passes(one.condition, one.request.recipe):
        family.truncated(each.condition, one.key.text_length, encodings.cut)
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "emoji-mmdit"
    cards = read_cards(MODELS)
    parts = build_parts(cards[model], cards, torch.device("cpu"), torch.float32)
    family = build_family(cards[model], parts, torch.device("cpu"), torch.float32)
    kept, taken = fresh(), dict[str, list[float]]()
    with torch.inference_mode():
        encode_rows(family, [row(family, "a red apple on a table")], None, kept)
        for number in range(TIMES + WARM_UPS):
            text = f"a red apple on a table, number {number}"
            ways = (("nothing kept", fresh()), ("empty kept", kept), ("all kept", kept))
            for name, encodings in ways:
                taken.setdefault(name, []).append(milliseconds(family, encodings, text))
    taken = {name: values[WARM_UPS:] for name, values in taken.items()}
    told = {name: {"least": round(min(v), 3), "median": round(statistics.median(v), 3)} for name, v in taken.items()}
    for name, figures in told.items():
        print(f"{name:13} {figures['least']:8.3f} ms least {figures['median']:8.3f} ms median")
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "cores": os.cpu_count()}
    facts |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "dtype": "float32"}
    print(json.dumps({"bench": "text", "model": model, "milliseconds": told, "bytes": kept.bytes, **facts}))


if __name__ == "__main__":
    main()
