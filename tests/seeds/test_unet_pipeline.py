"""U-Nets, run by the engine, against diffusers' pipelines on the same files: final latents in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.jobs.body import ImageBody
from app.pool.pool import Pool
from app.request import Framing, Request
from tests.families.plain import final, serve
from tests.parts.close import LEVELS, SAME, apart, beyond_rounding, close
from tests.parts.engine import Bench, load_all
from tests.parts.requests import changed
from tests.seeds.upstream import FRAMING, Body, final_latent, picture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NAMES = ("sd15", "sd2", "sdxl", "sdxl-deep", "sdxl-turbo")
PROMPT = {"prompt": "a red apple on a blue background"}
GREEN = {"negative_prompt": "green dog"}
EMPTY = {"negative_prompt": ""}
LONG = " ".join(["a small yellow flower"] * 12)
FRAMED = {"original_size": (512, 384), "crops_coords_top_left": (7, 31), "target_size": (1023, 640)}

CASES: list[tuple[str, Body]] = [
    ("sd15", {"size": "40x24", "num_inference_steps": 20, "guidance_scale": 7.5, **GREEN}),
    ("sd15", {"size": "40x24", "num_inference_steps": 8, "guidance_scale": 5.0}),
    ("sd15", {"size": "24x64", "num_inference_steps": 5, "guidance_scale": 1.0, "seed": 3, "prompt": LONG}),
    ("sd2", {"size": "24x56", "num_inference_steps": 25, "guidance_scale": 7.5, "seed": 5, **GREEN}),
    ("sd2", {"size": "56x40", "num_inference_steps": 7, "guidance_scale": 0.0}),
    ("sdxl", {"size": "40x24", "num_inference_steps": 30, "guidance_scale": 5.0, **GREEN}),
    ("sdxl", {"size": "40x24", "num_inference_steps": 10, "guidance_scale": 5.0, **EMPTY}),
    ("sdxl", {"size": "40x24", "num_inference_steps": 10, "guidance_scale": 5.0}),
    ("sdxl", {"size": "64x24", "num_inference_steps": 6, "guidance_scale": 3.0, "prompt": LONG, **FRAMED}),
    ("sdxl-deep", {"size": "24x40", "num_inference_steps": 8, "guidance_scale": 7.0, **GREEN}),
    ("sdxl-deep", {"size": "40x40", "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 2**31}),
    ("sdxl-turbo", {"size": "40x24", "num_inference_steps": 4, "guidance_scale": 0.0}),
    ("sdxl-turbo", {"size": "32x56", "num_inference_steps": 1, "guidance_scale": 0.0, "seed": 8}),
    ("sd15", {"size": "24x40", "num_inference_steps": 6, "guidance_scale": 5.0, "clip_skip": 2, **GREEN}),
    ("sdxl", {"size": "24x40", "num_inference_steps": 6, "guidance_scale": 5.0, "clip_skip": 1, **GREEN}),
]


def whole(body: Body) -> Body:
    return {"seed": 0, **PROMPT, **body}


@pytest.fixture(scope="module")
def cards(seed_models: Path) -> dict[str, Card]:
    """The checkpoints, and the same files under cards that are wrong in one thing."""
    found = {name: card for name, card in read_cards(seed_models).items() if name in NAMES}

    def wrong(name: str, of: str, schedule: Body | None = None, **changes: Any) -> Card:
        changes["schedule"] = found[of].schedule.model_copy(update=schedule or {})
        return found[of].model_copy(update={"id": name, **changes})

    others = [
        wrong("v as noise", "sd2", {"prediction": "epsilon"}),
        wrong("no offset", "sdxl", {"steps_offset": 0}),
        wrong("no offset of ddim", "sd15", {"steps_offset": 0}),
        wrong("to one", "sd15", {"set_alpha_to_one": True}),
        wrong("absent as empty", "sdxl", force_zeros=False),
        wrong("leading", "sdxl-turbo", {"spacing": "leading"}),
    ]
    return found | {card.id: card for card in others}


@pytest.fixture(scope="module")
def pool(cards: dict[str, Card]) -> Iterator[Pool]:
    loaded = load_all(Pool(cards, "cpu", torch.float32))
    yield loaded
    loaded.close()


@cache
def theirs(folder: Path, case: int) -> torch.Tensor:
    name, body = CASES[case]
    return final_latent(folder / name, whole(body))


def asked(card: Card, body: Body, name: str = "alone") -> Request:
    framing = Framing(*(body[one] for one in FRAMING)) if FRAMING[0] in body else None
    fields = {key: value for key, value in whole(body).items() if key not in FRAMING}
    request = ImageBody.model_validate(fields).to_request(card, name)
    return changed(request, keep_latents=True, framing=framing)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_latents_are_those_of_the_pipeline(seed_models: Path, cards: dict[str, Card], pool: Pool, case: int) -> None:
    name, body = CASES[case]
    (ours,) = serve(pool, asked(cards[name], body))
    close(final(ours), theirs(seed_models, case), SAME)


def test_in_a_mixed_batch_too(seed_models: Path, cards: dict[str, Card], pool: Pool) -> None:
    """Every case at once, among rows of its model and size with other prompts, samplers, steps, guidance, framing."""
    others = (("heun", 3, 1.0), ("euler_ancestral", 9, 2.0), ("dpmpp_2m", 6, 3.0))
    framing = {"original_size": (64, 64), "crops_coords_top_left": (0, 9), "target_size": (24, 40)}
    cases, near = [], []
    for case, (name, body) in enumerate(CASES):
        cases.append(asked(cards[name], body, f"case-{case}"))
        for seed, (sampler, steps, scale) in enumerate(others):
            other = {"prompt": "moon", "sampler": sampler, "num_inference_steps": steps, "guidance_scale": scale}
            near.append(asked(cards[name], {**body, **framing, **other, "seed": seed}, f"near-{case}-{seed}"))
    results = serve(pool, *near, *cases)[len(near) :]
    for case, ours in enumerate(results):
        assert ours.timings.shared > 1, "it shared no forward"
        close(final(ours), theirs(seed_models, case), SAME)


def test_deterministic_mode_is_bit_equal_alone_and_among_others(cards: dict[str, Card], pool: Pool) -> None:
    rows = [asked(cards[name], body, f"row-{case}") for case, (name, body) in enumerate(CASES) if "24" in body["size"]]
    together = Bench(pool, deterministic=True).run(rows)
    assert {tick.passes for tick in together.forwards} == {8} and max(tick.rows for tick in together.forwards) > 1
    for row in rows:
        alone = Bench(pool, deterministic=True).run([row])
        assert np.array_equal(alone.results[row.id, 0].latents, together.results[row.id, 0].latents)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (0, {"prompt": "a red apple on a blue house"}),
        (0, {"seed": 1}),
        (0, {"num_inference_steps": 21}),
        (0, {"guidance_scale": 7.4}),
        (0, {"model": "no offset of ddim"}),
        (0, {"model": "to one"}),
        (3, {"model": "v as noise"}),
        (3, {"negative_prompt": "green cat"}),
        (5, {"model": "no offset"}),
        (5, {"negative_prompt": None}),
        (6, {"negative_prompt": None}),
        (7, {"negative_prompt": ""}),
        (7, {"model": "absent as empty"}),
        (8, {"original_size": (384, 512)}),
        (8, {"crops_coords_top_left": (31, 7)}),
        (8, {"target_size": (640, 1023)}),
        (11, {"model": "leading"}),
        (13, {"clip_skip": 1}),
        (14, {"clip_skip": 0}),
    ],
    ids=str,
)
def test_controls_are_told_from_the_pipeline(
    seed_models: Path, cards: dict[str, Card], pool: Pool, case: int, wrong: dict[str, Any]
) -> None:
    name, body = CASES[case]
    (ours,) = serve(pool, asked(cards[wrong.get("model", name)], {**body, **wrong}))
    apart(final(ours), theirs(seed_models, case), SAME)


@pytest.mark.parametrize("case", [3, 8])
def test_the_picture_is_that_of_the_pipeline(seed_models: Path, cards: dict[str, Card], pool: Pool, case: int) -> None:
    name, body = CASES[case]
    (ours,) = serve(pool, asked(cards[name], body))
    image = picture(seed_models / name, theirs(seed_models, case))
    close(ours.pixels, image, LEVELS, beyond_rounding)
    apart(ours.pixels[::-1], image, LEVELS, beyond_rounding)
