"""LoRAs of U-Nets, run by the engine among others, against diffusers: final latents in float32, with controls.

Files that diffusers reads at this size are loaded by its pipelines (`load_lora_weights`, `set_adapters`); the pairs of
all are added to the weights by `tests.parts.unet_loras`, which is compared with the pipelines on those that both read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.jobs.body import ImageBody
from app.pool.pool import Pool
from app.report import Result
from app.request import Request
from tests.families.plain import final, serve
from tests.parts.close import SAME, apart, close
from tests.parts.engine import Bench, load_all
from tests.parts.loras import loaded, surveyed
from tests.parts.requests import changed
from tests.parts.unet_loras import Format, Pairs, draw, merged, write
from tests.seeds.upstream import Body, opened, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # two adapters in one encoder
]


class File(NamedTuple):
    """How a file is written. only: its layers. upstream: whether diffusers reads all of it."""

    model: str
    format: Format
    only: str
    ranks: tuple[int, ...] = (4, 2)
    alpha: float | None = None
    upstream: bool = True


BLOCKS = r"^unet\..*(attn|\.ff\.|proj_in|proj_out)"
LAYERS = r"^unet\..*(attn|\.ff\.|proj_|resnets|downsamplers|upsamplers)"
CLIPS = r"^text_encoder(_2)?\..*(attn|mlp)"
FILES = {
    "sd15-blocks": File("sd15", "kohya", BLOCKS, alpha=3.0),
    "sd15-clip": File("sd15", "kohya", CLIPS, alpha=2.0, upstream=False),
    "sd15-layers": File("sd15", "kohya", LAYERS, ranks=(3,), alpha=1.0),
    "sd15-old": File("sd15", "old", r"^unet\..*attn[12]\.to_"),
    "sd2-blocks": File("sd2", "peft", BLOCKS, ranks=(5,), alpha=2.0),
    "sdxl-peft": File("sdxl", "peft", LAYERS),
    "sdxl-clips": File("sdxl", "kohya", rf"{CLIPS}|^unet\..*attn2", alpha=1.5, upstream=False),
    "sdxl-sgm": File("sdxl-deep", "sgm", BLOCKS, alpha=3.0),
    "sdxl-sgm-layers": File("sdxl-deep", "sgm", LAYERS, ranks=(2,), alpha=5.0),
    "refiner-blocks": File("refiner", "peft", BLOCKS),
}
STACKS: list[dict[str, float]] = [
    *({name: 0.8} for name in FILES if not name.startswith("refiner")),
    {"sd15-blocks": -0.7, "sd15-clip": 1.2},
    {"sd15-layers": 0.5, "sd15-old": 1.5, "sd15-clip": -0.4},
    {"sdxl-peft": 0.6, "sdxl-clips": 0.9},
    {"sdxl-sgm": 1.1, "sdxl-sgm-layers": -0.5},
]
SIZES = {"sd15": "40x24", "sd2": "24x56", "sdxl": "40x24", "sdxl-deep": "24x40"}


def body_of(stack: dict[str, float]) -> Body:
    (model,) = {FILES[name].model for name in stack}
    text = {"prompt": "a red apple on a blue background", "negative_prompt": "green dog"}
    return {**text, "size": SIZES[model], "num_inference_steps": 8, "guidance_scale": 5.0, "seed": 11}


@pytest.fixture(scope="module")
def pairs(seed_models: Path) -> dict[str, Pairs]:
    return {
        name: draw(seed_models / file.model, file.only, file.ranks, seed=seed)
        for seed, (name, file) in enumerate(FILES.items())
    }


@pytest.fixture(scope="module")
def loras(seed_models: Path, pairs: dict[str, Pairs], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for name, file in FILES.items():
        write(folder / f"{name}.safetensors", seed_models / file.model, file.format, pairs[name], file.alpha)
    return folder


@pytest.fixture(scope="module")
def cards(seed_models: Path, loras: Path) -> dict[str, Card]:
    found = read_cards(seed_models)
    return surveyed(loras, {name: found[name] for name in (*SIZES, "refiner")})


def asked(cards: dict[str, Card], stack: dict[str, float], name: str, **changes: Any) -> Request:
    card = cards[FILES[next(iter(stack))].model]
    body = ImageBody.model_validate({**body_of(stack), **changes})
    return changed(body.to_request(card, name), keep_latents=True, adapters=tuple(sorted(stack.items())))


@pytest.fixture(scope="module")
def pool(cards: dict[str, Card]) -> Iterator[Pool]:
    loaded_ = load_all(Pool({name: cards[name] for name in SIZES}, "cpu", torch.float32))
    yield loaded_
    loaded_.close()


@pytest.fixture(scope="module")
def results(cards: dict[str, Card], pool: Pool) -> list[Result]:
    """Every stack, among rows of its model and size with other weights and with none."""
    near = []
    for number, stack in enumerate(STACKS):
        near.append(asked(cards, {name: -weight for name, weight in stack.items()}, f"near-{number}", seed=3))
        near.append(changed(asked(cards, stack, f"bare-{number}", prompt="moon"), adapters=()))
    found = serve(pool, *near, *(asked(cards, stack, f"case-{number}") for number, stack in enumerate(STACKS)))
    return found[len(near) :]


def plain(
    models: Path, pairs: dict[str, Pairs], stack: dict[str, float], body: Body, alpha: bool = True
) -> torch.Tensor:
    """By weights that this test adds. alpha: False ignores it."""
    model = FILES[next(iter(stack))].model
    files = [(pairs[name], FILES[name].alpha if alpha else None, weight) for name, weight in stack.items()]
    return run(merged(opened(models / model), files), read_cards(models)[model], body)


@cache
def theirs(models: Path, loras: Path, number: int) -> torch.Tensor:
    """By the pipelines' own loader."""
    stack = STACKS[number]
    model = FILES[next(iter(stack))].model
    files = [(loras / f"{name}.safetensors", weight) for name, weight in stack.items()]
    return run(loaded(opened(models / model), files), read_cards(models)[model], body_of(stack))


def test_the_traffic_was_mixed(results: list[Result]) -> None:
    assert sum(one.timings.shared > 1 for one in results) >= len(results) // 2


def test_deterministic_mode_is_bit_equal_alone_and_among_others(cards: dict[str, Card], pool: Pool) -> None:
    """With convolutions too."""
    stacks = [{"sd15-layers": 0.8}, {"sd15-layers": -0.5, "sd15-clip": 1.0}, {"sd15-blocks": 0.6}]
    rows = [asked(cards, stack, f"row-{number}", seed=number) for number, stack in enumerate(stacks)]
    rows.append(changed(rows[0], id="bare", adapters=()))
    together = Bench(pool, deterministic=True).run(rows)
    assert max(tick.rows for tick in together.forwards) > 1 and not together.failures
    for row in rows:
        alone = Bench(pool, deterministic=True).run([row])
        assert np.array_equal(alone.results[row.id, 0].latents, together.results[row.id, 0].latents)


UPSTREAM = [number for number, stack in enumerate(STACKS) if all(FILES[name].upstream for name in stack)]


@pytest.mark.parametrize("number", range(len(STACKS)), ids=lambda number: " + ".join(STACKS[number]))
def test_latents_are_those_of_the_grown_weights(
    seed_models: Path, pairs: dict[str, Pairs], results: list[Result], number: int
) -> None:
    close(final(results[number]), plain(seed_models, pairs, STACKS[number], body_of(STACKS[number])), SAME)


@pytest.mark.parametrize("number", UPSTREAM, ids=lambda number: " + ".join(STACKS[number]))
def test_latents_are_those_of_diffusers_own_loader(
    seed_models: Path, loras: Path, results: list[Result], number: int
) -> None:
    close(final(results[number]), theirs(seed_models, loras, number), SAME)


@pytest.mark.parametrize("number", range(len(FILES) - 1), ids=lambda number: " + ".join(STACKS[number]))
def test_faults_are_told(seed_models: Path, pairs: dict[str, Pairs], results: list[Result], number: int) -> None:
    """No adapter; a weight that is 0.05 more; alpha ignored; queries for keys; convolutions or text left out."""
    stack, body, ours = STACKS[number], body_of(STACKS[number]), final(results[number])
    (name,) = stack
    wide = {key: pair for key, pair in pairs[name].items() if pair[0].ndim == 2}
    alike = {key: pair for key, pair in wide.items() if re.search(r"attn1\.to_[qk]$|\.[qk]_proj$", key[1])}
    other = {"to_q": "to_k", "to_k": "to_q", "q_proj": "k_proj", "k_proj": "q_proj"}
    turned = {
        (part, re.sub(r"\w+$", lambda leaf: other[leaf[0]], module)): pair for (part, module), pair in alike.items()
    }
    apart(ours, plain(seed_models, pairs, {name: 0.0}, body), SAME)
    apart(ours, plain(seed_models, pairs, {name: 0.85}, body), SAME)
    apart(ours, plain(seed_models, {name: {**pairs[name], **turned}}, stack, body), SAME)
    if FILES[name].alpha is not None:
        apart(ours, plain(seed_models, pairs, stack, body, alpha=False), SAME)
    if len(wide) < len(pairs[name]):
        apart(ours, plain(seed_models, {name: wide}, stack, body), SAME)
    if len(bare := {key: pair for key, pair in pairs[name].items() if key[0] == "unet"}) < len(pairs[name]):
        apart(ours, plain(seed_models, {name: bare}, stack, body), SAME)
