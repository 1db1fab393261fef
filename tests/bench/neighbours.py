"""How long one image takes while other processes keep the processor busy: `python -m tests.bench.neighbours`.

An engine draws in a process of its own while 0, 1 and 2 endless loops run beside it. Each row is one setting of how
many threads it computes with and how long they spin at barriers: they spin there while others could use the core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
ALL = {"INSTEP_THREADS": str(os.cpu_count())}
SETTINGS: dict[str, dict[str, str]] = {
    "as Instep starts": {},
    "one thread, always": {"INSTEP_THREADS": "1"},
    "all threads, always": ALL,
    **{f"the same, GOMP_SPINCOUNT={count}": ALL | {"GOMP_SPINCOUNT": str(count)} for count in (0, 1_000, 20_000)},
}
LOOP = "import signal; signal.alarm(600)\nwhile True: pass"


def draw(model: str, steps: int, images: int, dtype: str) -> None:
    """Print the seconds of each image, one after the other, after one that is not counted."""
    from app.cards.cards import read_cards
    from app.jobs.body import read_body
    from app.jobs.job import Job
    from app.settings import Settings
    from app.worker.process import Local

    cards = read_cards(ROOT / "models")
    with tempfile.TemporaryDirectory() as cache, Local(Settings(cache=Path(cache), dtype=dtype), cards) as local:
        body = read_body({"model": model, "prompt": "red apple", "seed": 7, "num_inference_steps": steps})
        for number in range(images + 1):
            begin = time.perf_counter()
            job = local.submit(Job(body.to_request(cards[model], str(number)), cards[model], body))
            job.future.result()
            if number:
                print(json.dumps(time.perf_counter() - begin), flush=True)
    os._exit(0)


def seconds(setting: dict[str, str], loops: int, args: argparse.Namespace) -> float:
    """The median of the images that a fresh process draws beside so many endless loops."""
    words = [sys.executable, "-m", "tests.bench.neighbours", "--child", "--model", args.model, "--dtype", args.dtype]
    words += ["--steps", str(args.steps), "--images", str(args.images)]
    with ExitStack() as stack:
        for _ in range(loops):
            stack.callback(subprocess.Popen([sys.executable, "-c", LOOP]).kill)
        done = subprocess.run(words, cwd=ROOT, env=os.environ | setting, capture_output=True, text=True, timeout=500)
    return median(map(float, done.stdout.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-mmdit")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="settings, by their names")
    parser.add_argument("--loops", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        draw(args.model, args.steps, args.images, args.dtype)
    print(f"{'':34}" + "".join(f"{loops} busy neighbours".rjust(20) for loops in args.loops))
    for name in args.only:
        print(f"{name:34}", end="", flush=True)
        for loops in args.loops:
            print(f"{seconds(SETTINGS[name], loops, args):18.3f} s", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
