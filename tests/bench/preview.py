"""What a preview costs beside a step: `python -m tests.bench.preview [MODEL]`. Ends in one JSON line.

One guided row of a real checkpoint: a step is one forward of two passes, a preview the decoder's nearest linear map,
and the VAE's own decode stands beside them. Measured in turns, so that a disturbance meets all three.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from app.cards.cards import read_cards
from app.engine.row import default_key
from app.pool.pool import Pool

ROUNDS = 40


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main(model: str) -> None:
    pool = Pool(read_cards(Path("models")), "cpu", torch.float32)
    pool.want(model)
    while (family := pool.family(model)) is None or not pool.resident(model, "decode"):
        if error := pool.failure(model):
            raise error
        time.sleep(0.05)
    key = default_key(pool.cards[model])
    latent = torch.randn(1, *family.latent_shape(key.width, key.height))
    with torch.inference_mode():
        one = family.blank(key.text_length)
        conditions = {name: value.expand(2, *value.shape[1:]) for name, value in one.items()}
        x, t = latent.expand(2, -1, -1, -1), torch.tensor([500.0, 500.0])
        calls: dict[str, Callable[[], object]] = {
            "step": lambda: family.denoise(x, t, conditions),
            "preview": lambda: family.preview(latent),
            "decode": lambda: family.decode(latent),
        }
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                samples[name].append(milliseconds(call))
    medians = {name: round(statistics.median(values[3:]), 3) for name, values in samples.items()}
    for name, value in medians.items():
        print(f"{name:10} {value:8.3f} ms   min {min(samples[name]):8.3f}   max {max(samples[name]):8.3f}")
    share = round(medians["preview"] / medians["step"], 4)
    print(json.dumps({"bench": "preview", "model": model, "date": str(date.today()), **medians, "of_a_step": share}))
    pool.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "emoji-mmdit")
