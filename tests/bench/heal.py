"""How fast a spoiled profile heals: `python -m tests.bench.heal`.

The stored profile of `emoji-mmdit` says that a forward of one pass takes 0.98 s and knows no other width, as a busy
machine leaves it. Then rounds of seven requests (1, 2, 4, 8, 16, 24, 28 steps, the longest and the shortest guided) run
through the engine. Each line: forwards of the round, its seconds, and the passes of each forward. 28 is the least.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from app.cards.cards import read_cards
from app.engine.costs import Costs, Curve
from app.engine.row import default_key
from app.pool.budget import use_threads
from app.pool.pool import Pool
from app.request import ImageSpec, Prompt
from tests.parts.engine import Bench
from tests.parts.requests import flat

ROOT = Path(__file__).parent.parent.parent
MODEL = "emoji-mmdit"
STEPS = (1, 2, 4, 8, 16, 24, 28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    use_threads(2)
    cards = {name: card for name, card in read_cards(ROOT / "models").items() if name == MODEL}
    pool, key = Pool(cards, "cpu", getattr(torch, args.dtype)), default_key(cards[MODEL])
    pool.want(MODEL)
    while (family := pool.family(MODEL)) is None:
        pool.poll()
        time.sleep(0.1)
    costs = Costs(Path(tempfile.mkdtemp()))
    costs.add(family, key, Curve({1: 0.98}))
    bench = Bench(pool, costs=costs)
    for turn in range(args.rounds):
        print(*turn_of(bench, turn, cards[MODEL].text_length), flush=True)
    os._exit(0)


def turn_of(bench: Bench, turn: int, length: int) -> tuple[int, str, list[int]]:
    """Forwards, seconds and widths of one round, all of whose requests are there from its start."""
    before, begin = len(bench.forwards), time.perf_counter()
    for steps in STEPS:
        facts = {"steps": steps, "guided": steps % 8 != 0, "guidance": 4.0, "text_length": length}
        image, size = ImageSpec(Prompt("red apple"), 7), {"width": 64, "height": 64}
        bench.engine.submit(flat(f"{turn}-{steps}", MODEL, (image,), sampler="flow_euler", **size, **facts))
    while len(bench.results) < len(STEPS) * (turn + 1):
        bench.engine.tick()
        assert not bench.failures, bench.failures
    widths = [tick.passes for tick in bench.forwards[before:]]
    return len(widths), f"{time.perf_counter() - begin:.2f} s", widths


if __name__ == "__main__":
    main()
