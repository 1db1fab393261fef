"""What LoRA costs: forwards of 16 passes with adapters and without, in turns: `python -m tests.bench.loras`.

    (nothing)               emoji-mmdit, with adapters of rank 8 on all layers of attention
    --network 1024x8x32     a random SD3 of this width, so many blocks, and 32 x 32 image tokens; rank 16
    --before COMMIT         forwards without adapters, beside those of another commit

Float32, whole ticks of the engine: 16 unguided rows, which come in an order in which hardly any neighbours have the
same adapter. Ratios are of the medians of one run; the bars are 1.25 for one adapter, 1.6 for four, and no more than
noise beside the commit before. Two threads beside other programs measure the waiting of one for the other: take
OMP_NUM_THREADS=1 there. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.bench.machine import alternate, facts, milliseconds
from app.cards.card import Card
from app.cards.cards import read_card, read_cards
from app.pool.pool import Pool
from app.report import Result, Tick
from app.request import ImageSpec, Prompt
from app.settings import Settings
from tests.parts.engine import Bench, FakeCosts, load_all
from tests.parts.requests import changed, flat

ROOT = Path(__file__).parents[2]
MODEL, PASSES = "emoji-mmdit", 16
NAMES = ("one", "two", "three", "four")
WAYS: dict[str, Sequence[str]] = {
    "none": [""] * PASSES,
    "1 row": ["one", *[""] * (PASSES - 1)],
    "4 rows": ["one", "", "", ""] * (PASSES // 4),
    "16 rows": ["one"] * PASSES,
    "four adapters": [*NAMES] * (PASSES // 4),
}
"""The adapter of each row, in the order in which they come."""

ATTENTION = r"^transformer.*attn2?\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)$"
CHILD = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='before')"
"""Run by the interpreter in another checkout, which it imports from."""


def step_seconds(pool: Pool, card: Card, names: Sequence[str], steps: int) -> float:
    """Draw an image with each of these adapters, all in one engine; the median of its ticks with all rows in them."""
    bench, taken, done = Bench(pool, costs=FakeCosts(passes=PASSES)), [], 0
    width, height = map(int, card.defaults.size.split("x"))
    for number, name in enumerate(names):
        images = (ImageSpec(Prompt("a red apple"), number),)
        asked = flat(
            str(number), card.id, images, width, height, "flow_euler", steps, 1.0, card.text_length, guided=False
        )
        bench.engine.submit(changed(asked, adapters=((name, 0.8),)) if name else asked)
    while done < len(names):
        begin = time.perf_counter()
        bench.engine.tick()
        seconds = time.perf_counter() - begin
        assert not bench.failures, bench.failures
        if any(isinstance(one, Tick) and one.phase == "denoise" and one.rows == len(names) for one in bench.reports):
            taken.append(seconds)
        done += sum(isinstance(one, Result) for one in bench.reports)
        bench.reports.clear()
    return statistics.median(taken[1:])  # the first one gathers


def write_network(folder: Path, width: int, blocks: int, side: int) -> Card:
    """A random SD3 with heads of 64, and side x side image tokens."""
    from tests.parts.tiny import write_sd3

    heads = {"num_attention_heads": width // 64, "attention_head_dim": 64, "caption_projection_dim": width}
    write_sd3(folder, name="random", num_layers=blocks, sample_size=2 * side, pos_embed_max_size=2 * side, **heads)
    file, size = folder / "card.toml", 8 * side
    text = file.read_text(encoding="utf-8").replace("max = 64", f"max = {size}").replace('"32x32"', f'"{size}x{size}"')
    file.write_text(text, encoding="utf-8")
    return read_card(file)


def with_files(card: Card, folder: Path, rank: int) -> Card:
    """The card with four adapters, in files that are written for it."""
    from tests.parts.loras import surveyed, write_lora

    for seed, name in enumerate(NAMES):
        write_lora(folder / f"{name}.safetensors", card.file.parent, only=ATTENTION, ranks=(rank,), seed=seed)
    return surveyed(folder, {card.id: card})[card.id]


def measure_ways(network: str, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a forward by way, and how many times as long as without adapters."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [int(one) for one in network.split("x")] if network else []
        card = write_network(Path(folder) / "random", *sizes) if sizes else read_cards(ROOT / "models")[MODEL]
        card = with_files(card, Path(folder) / "loras", 16 if sizes else 8)
        pool = load_all(Pool({card.id: card}, "cpu", torch.float32))
        times = alternate(
            {name: partial(step_seconds, pool, card, way, steps) for name, way in WAYS.items()}, rounds, 1
        )
        pool.close()
    return {"model": card.id, "network": network, "steps": steps, "rounds": rounds, **compared(times, "none")}


def compared(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    """Milliseconds by way, and the medians over that of the base; a line of each on the terminal."""
    least = statistics.median(times[base])
    found = {
        name: {**milliseconds(one), "ratio": round(statistics.median(one) / least, 4)} for name, one in times.items()
    }
    for name, one in found.items():
        print(
            f"{name:14} {one['median']:10.3f} ms   {one['least']:10.3f} least   {one['ratio']:6.3f} times", flush=True
        )
    return {"ways": found}


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", made, commit], cwd=ROOT, check=True)
        try:
            yield made
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", made], cwd=ROOT, check=True)


@contextmanager
def stepping(tree: Path, steps: int) -> Iterator[Callable[[], float]]:
    """A process with the code of this checkout; what is called measures once there, without adapters."""
    command = [sys.executable, "-c", CHILD, __file__, str(ROOT / "models"), str(steps)]
    with subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        begun = process.stdout.readline().strip()
        assert begun == str(tree.resolve()), f"{begun} runs, not {tree}"

        def once() -> float:
            assert process.stdin and process.stdout
            print(file=process.stdin, flush=True)
            return float(process.stdout.readline())

        yield once
        process.stdin.close()


def serve_steps(models: Path, steps: int) -> None:
    """Print where the code is from; then, for each line that is read, the seconds of a forward without adapters."""
    import app

    card = read_cards(models)[MODEL]
    pool = load_all(Pool({card.id: card}, "cpu", torch.float32))
    print(Path(app.__file__).resolve().parents[1], flush=True)
    for _ in sys.stdin:
        print(step_seconds(pool, card, WAYS["none"], steps), flush=True)


def measure_before(commit: str, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a forward without adapters, of that commit and of this checkout, in two processes in turns."""
    with checkout(commit) as tree, stepping(tree, steps) as before, stepping(ROOT, steps) as after:
        times = alternate({"before": before, "after": after}, rounds, 1)
    return {"model": MODEL, "before": commit, "steps": steps, "rounds": rounds, **compared(times, "before")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="", help="WIDTHxBLOCKSxSIDE of a random SD3")
    parser.add_argument("--before", default="", metavar="COMMIT")
    parser.add_argument("--steps", type=int, default=28, help="forwards of a measurement")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each way")
    args = parser.parse_args()
    if args.before:
        found = measure_before(args.before, args.steps, args.rounds)
    else:
        found = measure_ways(args.network, args.steps, args.rounds)
    print(json.dumps({"bench": "loras", **facts(Settings(devices="cpu", dtype="float32")), **found}))


if __name__ == "before":
    serve_steps(Path(sys.argv[2]), int(sys.argv[3]))
elif __name__ == "__main__":
    main()
