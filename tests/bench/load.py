"""What a load costs those who run: gaps between the forwards of one model while another of 1 GB loads and leaves.

    python -m tests.bench.load [--megabytes 1000] [--rounds 4]

Ends in one JSON line. The bar: the 99th percentile of the gaps is at most three times their median.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel

from app.cards.card import Card
from app.cards.cards import read_card, read_cards
from app.engine.engine import Engine
from app.pool.pool import Pool
from app.report import ModelState, Report, Result, Tick
from app.request import ImageSpec, Prompt
from app.settings import Settings
from tests.parts.requests import flat

RUNNING = "emoji-mmdit"
CLIENTS = 4
WIDTH = 1024
LAYER = 18 * WIDTH * WIDTH * 4
"""Bytes of one layer in float32: attention 4, feed-forward 8 and modulation 6 times the width squared."""

CARD = """\
id = "large"
family = "dit"
source = { path = "." }
classes = 10
schedule = { kind = "diffusion" }
defaults = { sampler = "ddim", num_inference_steps = 8, guidance_scale = 4.0, size = "64x64" }
limits = { num_inference_steps = 50, sizes = { min = 64, max = 64, multiple = 64, square = true } }
"""


def write_large(folder: Path, megabytes: int) -> Card:
    """A DiT of that many megabytes in float32, with random weights."""
    network = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=64, in_channels=4, out_channels=4, sample_size=32, patch_size=2,
        num_layers=round(megabytes * 1e6 / LAYER), num_embeds_ada_norm=10,
    )  # fmt: skip
    network.save_pretrained(folder / "transformer", max_shard_size="100GB")
    AutoencoderKL(latent_channels=4, block_out_channels=(32, 32)).save_pretrained(folder / "vae")
    parts = {"transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(parts))
    (folder / "card.toml").write_text(CARD)
    return read_card(folder / "card.toml")


class Traffic:
    """Requests that are always there, and the moments at which their forwards ended."""

    def __init__(self, cards: dict[str, Card]) -> None:
        self.pool = Pool(cards, "cpu", torch.float32)
        self.engine = Engine(self.pool, Settings(), self._hear)
        self.forwards: list[float] = []
        self.states: dict[str, str] = {}
        self._count = 0
        self._thread = threading.Thread(target=self.engine.run, daemon=True)
        self._thread.start()
        for _ in range(CLIENTS):
            self._ask()

    def stop(self) -> None:
        self.engine.stop()
        self._thread.join(60)
        self.pool.close()

    def until(self, model: str, state: str) -> None:
        while self.states.get(model) != state:
            time.sleep(0.01)

    def _hear(self, report: Report) -> None:
        if isinstance(report, Tick) and report.phase == "denoise":
            self.forwards.append(time.perf_counter())
        elif isinstance(report, Result):
            self._ask()
        elif isinstance(report, ModelState):
            self.states[report.model] = report.state

    def _ask(self) -> None:
        self._count += 1
        image = ImageSpec(Prompt("red apple"), self._count)
        self.engine.submit(flat(
            id=str(self._count), model=RUNNING, images=(image,), width=64, height=64, sampler="flow_euler", steps=28,
            guidance=4.0, text_length=24,
        ))  # fmt: skip


def between(moments: Sequence[float], start: float, end: float) -> np.ndarray:
    """Milliseconds between forwards in this time; an encode or a decode in between counts in."""
    return np.diff([moment for moment in moments if start <= moment <= end]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        large = write_large(Path(folder), args.megabytes)
        traffic = Traffic({RUNNING: read_cards(Path("models"))[RUNNING], "large": large})
        traffic.until(RUNNING, "ready")
        time.sleep(5)
        gaps: dict[str, list[np.ndarray]] = {"alone": [], "loading": []}
        seconds = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            time.sleep(3)
            middle = time.perf_counter()
            traffic.engine.load("large")
            traffic.until("large", "ready")
            end = time.perf_counter()
            gaps["alone"].append(between(traffic.forwards, start, middle))
            gaps["loading"].append(between(traffic.forwards, middle, end))
            seconds.append(end - middle)
            traffic.engine.unload("large")
            traffic.until("large", "absent")
        traffic.stop()
    facts: dict[str, object] = {"bench": "load", "date": str(date.today()), "megabytes": args.megabytes}
    facts["load_seconds"] = [round(one, 2) for one in seconds]
    for name, found in gaps.items():
        every = np.concatenate(found)
        median, high = np.median(every), np.percentile(every, 99)
        ratio = round(float(high / median), 2)
        facts[name] = {"gaps": len(every), "median_ms": round(median, 1), "p99_ms": round(high, 1), "ratio": ratio}
        print(f"{name:8} {len(every):5} gaps   median {median:7.1f} ms   p99 {high:7.1f} ms   ratio {ratio:.2f}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
