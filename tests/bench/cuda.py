"""What a GPU does before anything is made faster: `python -m tests.bench.cuda --out FOLDER [--cards a,b] [--tiny]`.

Attention by back end and head size; then of each card at its true size, with random weights: milliseconds a step by
passes, VAE decodes, and one image beside diffusers' pipelines. A line of JSON each, written to FOLDER/cuda.jsonl as it
comes, so that a run that is cut short keeps what it has. Making 1e9 random weights takes a quarter of a minute, most of
the time: name the cards that there is time for. --tiny is the same on a CPU with networks of a test's size.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from app.bench.engine import ask, measure_image, measure_steps
from app.bench.machine import alternate, ceilings, facts, milliseconds, wait
from app.bench.subject import loaded
from app.cards.card import Size, parse_size
from app.families.base import Family
from app.pool.pool import Pool
from app.settings import Settings
from app.worker import plan
from app.worker.process import resolve_dtype
from tests.bench.compare import pipelines
from tests.parts.tiny import write_models

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
CALLS = 20
"""Of an attention in one measurement: one alone takes less than its launch."""

DECODES = ("256x256", "512x512", "1024x1024")


class Shape(NamedTuple):
    """Of one attention: passes, heads, tokens, numbers a head."""

    passes: int
    heads: int
    tokens: int
    head: int


class Plan(NamedTuple):
    """Of one card. steps: widths by size. images: (steps, guidance, size), each in a run with each of the baselines.

    The baselines come in their order; "" is none.
    """

    steps: Mapping[str, tuple[int, ...]]
    images: tuple[tuple[int, float, str], ...]
    baselines: tuple[str, ...] = ("eager-bfloat16", "compiled")


SHAPES = {
    "DiT-XL/2 256, 8 passes": Shape(8, 16, 256, 72),
    "DiT-XL/2 512, 2 passes": Shape(2, 16, 1024, 72),
    "SD3-medium 1024, 2 passes": Shape(2, 24, 4096 + 333, 64),
    "SD3.5-large 1024, 2 passes": Shape(2, 38, 4096 + 333, 64),
    "FLUX.1 1024, 1 pass": Shape(1, 24, 4096 + 512, 128),
}
CARDS = {
    "dit-xl-2-256": Plan({"256x256": (1, 2, 4, 8, 16, 32, 64)}, ((50, 4.0, "256x256"),)),
    "dit-xl-2-512": Plan({"512x512": (1, 2, 4, 8, 16)}, ((50, 4.0, "512x512"),)),
    "sd3-medium": Plan({"512x512": (1, 2, 4, 8), "1024x1024": (1, 2, 4)}, ((28, 7.0, "1024x1024"),)),
    "sd3.5-large": Plan({"512x512": (1, 2, 4), "1024x1024": (1, 2, 4)}, ((28, 4.5, "1024x1024"),)),
    "sd3.5-large-turbo": Plan({"1024x1024": (1, 2, 4)}, ((4, 0.0, "1024x1024"),)),
    "flux.1-dev": Plan({"512x512": (1, 2), "1024x1024": (1, 2)}, ((28, 3.5, "1024x1024"),)),
    "flux.1-schnell": Plan({"1024x1024": (1, 2)}, ((4, 0.0, "1024x1024"),)),
}
"""In the order in which what fails for want of memory or of time costs least."""

TINY_SHAPES = {"tiny, 2 passes": Shape(2, 2, 16, 8)}
TINY_CARDS = {
    "tiny-dit": Plan({"32x32": (1, 2)}, ((2, 4.0, "32x32"),), ("",)),
    "tiny-sd3": Plan({"32x32": (1, 2), "64x64": (1,)}, ((2, 4.0, "32x32"),), ("eager-float32",)),
}

Line = dict[str, Any]


def attention(shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype, rounds: int) -> Iterator[Line]:
    """Milliseconds of each back end by name, in turns; "refused" for one that has no kernel for the shape."""
    for name, (passes, heads, tokens, head) in shapes.items():
        q, k, v = (torch.randn(passes, heads, tokens, head, device=device, dtype=dtype) for _ in range(3))
        ways, told = {}, dict.fromkeys(BACKENDS, "refused")
        for backend in BACKENDS:
            way = _timed(lambda backend=backend, q=q, k=k, v=v: _attend(backend, q, k, v), device, CALLS)
            try:
                way()
            except (torch.AcceleratorError, torch.OutOfMemoryError):
                raise
            except RuntimeError:  # no such kernel; torch says so in several ways
                continue
            ways[backend] = way
        told |= {backend: milliseconds(samples) for backend, samples in alternate(ways, rounds).items()}
        yield {"bench": "attention", "of": name, "shape": [passes, heads, tokens, head], "ms": told}


def _attend(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return scaled_dot_product_attention(q, k, v)


def of_card(
    settings: Settings, pool: Pool, family: Family, chosen: Plan, most: Mapping[str, float], rounds: int
) -> Iterator[Line]:
    """Steps of every size and width, decodes, and images."""
    for text, widths in chosen.steps.items():
        for row in measure_steps(family, *parse_size(text), widths, rounds, most):
            yield {"bench": "step", "size": text, **row}
    for text in _sizes(family, (*chosen.steps, *DECODES)):
        yield {"bench": "decode", "size": text, "ms": milliseconds(_decode(family, parse_size(text), rounds))}
    for baseline, (steps, guidance, text) in itertools.product(chosen.baselines, chosen.images):
        request = ask(family.card, num_inference_steps=steps, guidance_scale=guidance, size=text)
        others = pipelines(settings, family, request, [baseline] if baseline else [])
        times, stages, _ = measure_image(pool, settings, request, rounds, others)
        ms = {name: milliseconds(samples) for name, samples in {**times, **stages}.items()}
        yield {"bench": "image", "size": text, "steps": steps, "guidance": guidance, "ms": ms}


def _sizes(family: Family, texts: Iterable[str]) -> list[str]:
    """Those that the card allows, each once."""
    sizes = family.card.limits.sizes
    return [text for text in dict.fromkeys(texts) if all(sizes.min <= side <= sizes.max for side in parse_size(text))]


def _decode(family: Family, size: Size, rounds: int) -> list[float]:
    """Seconds of one latent to its pixels, on the device."""
    latents = torch.randn(1, *family.latent_shape(*size), device=family.device)
    with torch.inference_mode():
        return alternate({"decode": _timed(lambda: family.decode(latents), family.device)}, rounds)["decode"]


def _timed(work: Callable[[], object], device: torch.device, calls: int = 1) -> Callable[[], float]:
    """A function that gives the seconds of one of so many calls."""

    def way() -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait(device)
        return (time.perf_counter() - start) / calls

    return way


def sweep(settings: Settings, shapes: Mapping[str, Shape], cards: Mapping[str, Plan], rounds: int) -> Iterator[Line]:
    """Every line; the first of each card says what measured it. What fails says so, and the next comes."""
    device = torch.device(plan.devices(settings.devices)[0])
    yield from _guarded("attention", attention(shapes, device, resolve_dtype(settings, str(device)), rounds))
    for name, chosen in cards.items():
        yield from _guarded(name, _lines(settings, name, chosen, rounds))


def _lines(settings: Settings, name: str, chosen: Plan, rounds: int) -> Iterator[Line]:
    with loaded(settings, name, random_weights=True) as (pool, family):
        most = ceilings(family.device, family.dtype)
        yield {"bench": "facts", "model": name, **facts(settings), **most}
        for line in of_card(settings, pool, family, chosen, most, rounds):
            yield {"model": name, **line}


def _guarded(name: str, lines: Iterator[Line]) -> Iterator[Line]:
    """The lines and, when they break off, a last one with the reason; then the memory is free for the next card."""
    failed = ""
    try:
        yield from lines
    except torch.AcceleratorError:
        raise
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    if failed:
        yield {"bench": "failed", "model": name, "error": failed}
    del lines
    torch.compiler.reset()
    gc.collect()  # an engine and its parts hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cards", default="", help=f"some of {', '.join(CARDS)}")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(words)
    shapes, cards = (TINY_SHAPES, TINY_CARDS) if args.tiny else (SHAPES, CARDS)
    chosen = {name: cards[name] for name in args.cards.split(",") if name} or cards
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (args.out / "cuda.jsonl").open("a", encoding="utf-8") as file:
        models = Path("models")
        if args.tiny:
            models = Path(folder)
            write_models(models)
        settings = Settings(models=models, devices="cpu" if args.tiny else "cuda:0", cache=args.out / "cache")
        for line in sweep(settings, shapes, chosen, args.rounds):
            text = json.dumps(line)
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()


if __name__ == "__main__":
    main()
