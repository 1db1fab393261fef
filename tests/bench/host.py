"""What a step costs beside the network: `python -m tests.bench.host`. Ends in one JSON line.

16 rows, half guided, of 3 samplers, 16x8x8 latents (a 64 px image); the network is replaced by one that returns a
tensor made before, so that what is left is the batcher, the tables, the update and the settling. `update` is the whole
step with the lines of the tables in it; the bar is 0.15 ms for batcher, tables and update together. The same rows run
together all the while, so that what they gather by is kept; `gather anew` is what a row that comes or goes costs more.
"""

from __future__ import annotations

import json
import statistics
import time
from datetime import date

import numpy as np
import torch

from app.engine.step import Slots, denoise_step, gather
from app.families.base import Conditions
from app.pool.budget import processor
from tests.parts.engine import Bench, FakeCosts, FakeFamily, FakePool, card, request

ROWS, STEPS = 16, 250
SAMPLERS = ("flow_euler", "flow_heun", "flow_dpmpp_2m")


class FreeFamily(FakeFamily):
    """A network that costs nothing."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return (16, 8, 8)

    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> tuple[torch.Tensor, None]:
        return x, None


def engine_with_rows(pool: FakePool) -> Bench:
    bench = Bench(pool, costs=FakeCosts(passes=2 * ROWS))
    for number in range(ROWS):
        sampler = SAMPLERS[number % 3]
        bench.engine.submit(request(f"r{number}", sampler=sampler, steps=STEPS, guided=number % 2 == 0))
    while not bench.forwards or bench.forwards[-1].rows < ROWS:
        bench.turn()
    return bench


def milliseconds(call: object, times: int = 150) -> list[float]:
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def _gather_anew(slots: Slots, index: np.ndarray) -> None:
    """As after a row has come or gone."""
    slots.gathered = None
    gather(slots, index)


def main() -> None:
    torch.set_num_threads(1)
    limits = {"num_inference_steps": STEPS, "sizes": {"min": 16, "max": 64}}
    pool = FakePool(FreeFamily(card(limits=limits)))
    bench = engine_with_rows(pool)
    engine = bench.engine
    whole = milliseconds(engine.tick)
    choice = milliseconds(lambda: engine.batcher.next(time.monotonic()))
    work = engine.batcher.next(time.monotonic())
    assert work is not None and len(work.rows) == ROWS
    slots = engine.runner.slots[work.key]
    index = np.array([row.slot for row in work.rows])
    layout = milliseconds(lambda: (gather(slots, index), slots.lines(index)))
    anew = milliseconds(lambda: _gather_anew(slots, index))
    family = pool.families[work.key.model]
    with torch.inference_mode():
        update = milliseconds(lambda: denoise_step(family, slots, index))
    charge = milliseconds(lambda: engine.batcher.charge(work, 0.0))
    parts = {"tick": whole, "batcher": choice, "charge": charge, "tables": layout, "update": update}
    parts["gather anew"] = anew
    print(f"{'part':24} {'median ms':>10} {'min':>8} {'max':>8}")
    for name, samples in parts.items():
        print(f"{name:24} {statistics.median(samples):10.3f} {min(samples):8.3f} {max(samples):8.3f}")
    medians = {name: round(statistics.median(samples), 4) for name, samples in parts.items()}
    asked = ("batcher", "charge", "tables", "update")
    medians["host"] = round(sum(medians[name] for name in asked), 4)
    medians["host_least"] = round(sum(min(parts[name]) for name in asked), 4)
    print(f"batcher, tables and update together: median {medians['host']:.3f} ms, least {medians['host_least']:.3f} ms")
    print(json.dumps({"bench": "host", "rows": ROWS, "date": str(date.today()), "machine": processor(), **medians}))


if __name__ == "__main__":
    main()
