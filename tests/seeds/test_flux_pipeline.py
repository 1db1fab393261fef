"""FLUX.1, run by the engine, against diffusers' FluxPipeline on the same files: final latents in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from transformers import CLIPTextModel

from app.cards.card import Card
from app.cards.cards import read_cards
from app.jobs.body import ImageBody
from app.pool.pool import Pool
from app.request import Request
from app.samplers.schedule import DynamicShift
from tests.families.plain import final, serve
from tests.parts.close import LEVELS, SAME, apart, beyond_rounding, close
from tests.parts.engine import Bench, load_all
from tests.parts.requests import changed
from tests.seeds.upstream import Body, final_latent, opened, picture, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NAMES = ("schnell", "schnell-no-t5", "dev", "dev-no-clip")
PROMPT = {"prompt": "a red apple on a blue background"}
NEGATIVE = {"true_cfg_scale": 4.0, "negative_prompt": "green dog"}
SHARED = {
    "text_encoder": "sd3/text_encoder",
    "tokenizer": "sd3/tokenizer",
    "text_encoder_2": "sd3/text_encoder_3",
    "tokenizer_2": "sd3/tokenizer_3",
}
LONG = " ".join(["a small yellow flower"] * 12)

CASES: list[tuple[str, Body]] = [
    ("schnell", {"size": "32x32", "num_inference_steps": 4, "guidance_scale": 0.0}),
    ("schnell", {"size": "40x24", "num_inference_steps": 4, "guidance_scale": 0.0, "seed": 3}),
    ("schnell", {"size": "24x56", "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 2**31}),
    ("schnell", {"size": "40x24", "num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": "green dog"}),
    ("schnell-no-t5", {"size": "40x40", "num_inference_steps": 4, "guidance_scale": 0.0, "prompt": LONG}),
    ("dev", {"size": "40x24", "num_inference_steps": 28, "guidance_scale": 3.5}),
    ("dev", {"size": "64x64", "num_inference_steps": 5, "guidance_scale": 1.0, "seed": 7}),
    ("dev", {"size": "16x16", "num_inference_steps": 5, "guidance_scale": 0.0, "max_sequence_length": 17}),
    ("dev", {"size": "40x24", "num_inference_steps": 10, "guidance_scale": 3.5, "seed": 5, **NEGATIVE}),
    ("dev", {"size": "24x40", "num_inference_steps": 6, "guidance_scale": 30.0, "prompt": LONG, **NEGATIVE}),
    ("dev-no-clip", {"size": "56x24", "num_inference_steps": 8, "guidance_scale": 2.0, **NEGATIVE}),
]


def whole(body: Body) -> Body:
    return {"seed": 0, **PROMPT, **body}


@pytest.fixture(scope="module")
def cards(seed_models: Path) -> dict[str, Card]:
    """The checkpoints; dev under a card with another dynamic shift; and schnell with the encoders of an SD3."""
    found = {name: card for name, card in read_cards(seed_models).items() if name in (*NAMES, "sd3")}
    found["sharing"] = found["schnell"].model_copy(update={"id": "sharing", "components": SHARED})
    shift = DynamicShift(base_tokens=4, max_tokens=64, base=0.5, max=1.25)
    schedule = found["dev"].schedule.model_copy(update={"dynamic_shift": shift})
    return {**found, "shifted": found["dev"].model_copy(update={"id": "shifted", "schedule": schedule})}


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
    return changed(ImageBody.model_validate(whole(body)).to_request(card, name), keep_latents=True)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_latents_are_those_of_the_pipeline(seed_models: Path, cards: dict[str, Card], pool: Pool, case: int) -> None:
    name, body = CASES[case]
    (ours,) = serve(pool, asked(cards[name], body))
    close(final(ours), theirs(seed_models, case), SAME)


def test_in_a_mixed_batch_too(seed_models: Path, cards: dict[str, Card], pool: Pool) -> None:
    """Every case at once, among rows of its model and size with other prompts, samplers, steps and guidance."""
    others = (("flow_heun", 3, 1.0), ("flow_euler", 9, 2.0))
    cases, near = [], []
    for case, (name, body) in enumerate(CASES):
        cases.append(asked(cards[name], body, f"case-{case}"))
        for seed, (sampler, steps, scale) in enumerate(others):
            other = {"prompt": "moon", "sampler": sampler, "num_inference_steps": steps, "guidance_scale": scale}
            near.append(asked(cards[name], {**body, **other, "seed": seed}, f"near-{case}-{seed}"))
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
        (0, {"num_inference_steps": 5}),
        (3, {"guidance_scale": 3.9}),
        (5, {"guidance_scale": 3.4}),
        (5, {"guidance_scale": 1.0}),
        (5, {"true_cfg_scale": 1.1}),
        (5, {"model": "shifted"}),
        (8, {"true_cfg_scale": 3.9}),
        (8, {"negative_prompt": "green cat"}),
        (8, {"guidance_scale": 3.6}),
    ],
    ids=str,
)
def test_controls_are_told_from_the_pipeline(
    seed_models: Path, cards: dict[str, Card], pool: Pool, case: int, wrong: dict[str, Any]
) -> None:
    name, body = CASES[case]
    (ours,) = serve(pool, asked(cards[wrong.get("model", name)], {**body, **wrong}))
    apart(final(ours), theirs(seed_models, case), SAME)


def test_the_picture_is_that_of_the_pipeline(seed_models: Path, cards: dict[str, Card], pool: Pool) -> None:
    name, body = CASES[8]
    (ours,) = serve(pool, asked(cards[name], body))
    image = picture(seed_models / name, theirs(seed_models, 8))
    close(ours.pixels, image, LEVELS, beyond_rounding)
    apart(ours.pixels[::-1], image, LEVELS, beyond_rounding)


def test_encoders_may_be_those_of_an_sd3(seed_models: Path, cards: dict[str, Card], pool: Pool) -> None:
    """SD3's CLIP-L, with its projection, and its T5: held once for both models, and FLUX sees what it pools before."""
    name, body = CASES[3]
    (ours,) = serve(pool, asked(cards["sharing"], body))
    own, sd3 = opened(seed_models / name), opened(seed_models / "sd3")
    clip = CLIPTextModel.from_pretrained(seed_models / "sd3" / "text_encoder")
    parts = {**own.components, "text_encoder": clip, "tokenizer": sd3.tokenizer}
    shared = FluxPipeline(**{**parts, "text_encoder_2": sd3.text_encoder_3, "tokenizer_2": sd3.tokenizer_3})
    close(final(ours), run(shared, cards["sharing"], whole(body)), SAME)
    apart(final(ours), theirs(seed_models, 3), SAME)
    both = pool.family("sharing"), pool.family("sd3")
    assert both[0].clip[0] is both[1].clips[0][0] and both[0].t5[0] is both[1].t5[0]
