"""Schedules, samplers that add noise, and clip_skip, drawn by the engine, against diffusers' pipelines: final latents.

The pipelines get the scheduler that a user of diffusers would make of their own one's config.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from app.cards.card import Card
from app.cards.cards import read_cards
from app.jobs.body import ImageBody
from app.pool.pool import Pool
from app.request import Request
from tests.bench.upstream import SCHEDULERS
from tests.families.plain import final, serve
from tests.parts.close import SAME, apart, close
from tests.parts.engine import load_all
from tests.parts.requests import changed
from tests.seeds.upstream import Body, opened, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

WHOLE = {"prompt": "a red apple on a blue background", "negative_prompt": "green dog", "size": "40x24", "seed": 4}

CASES: list[tuple[str, Body]] = [
    ("sd15", {"sampler": "dpmpp_2m", "schedule": "karras", "num_inference_steps": 20, "guidance_scale": 7.5}),
    ("sdxl", {"sampler": "dpmpp_2m", "schedule": "karras", "num_inference_steps": 12, "guidance_scale": 5.0}),
    ("sdxl", {"sampler": "dpmpp_2m_sde", "schedule": "karras", "num_inference_steps": 12, "guidance_scale": 5.0}),
    ("sd2", {"sampler": "dpmpp_2m_sde", "num_inference_steps": 10, "guidance_scale": 3.0}),
    ("sdxl", {"sampler": "euler", "schedule": "karras", "num_inference_steps": 9, "guidance_scale": 5.0}),
    ("sd2", {"sampler": "heun", "schedule": "exponential", "num_inference_steps": 6, "guidance_scale": 3.0}),
    ("sdxl", {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}),
    ("sd15", {"sampler": "lcm", "num_inference_steps": 7, "guidance_scale": 2.0}),
    ("sd15", {"sampler": "ddim", "num_inference_steps": 6, "guidance_scale": 5.0, "clip_skip": 1}),
    ("sdxl", {"sampler": "euler", "num_inference_steps": 6, "guidance_scale": 5.0, "clip_skip": 1}),
]


@pytest.fixture(scope="module")
def cards(seed_models: Path) -> dict[str, Card]:
    return {name: card for name, card in read_cards(seed_models).items() if name in {name for name, _ in CASES}}


@pytest.fixture(scope="module")
def pool(cards: dict[str, Card]) -> Iterator[Pool]:
    loaded = load_all(Pool(cards, "cpu", torch.float32))
    yield loaded
    loaded.close()


def asked(card: Card, body: Body, name: str = "alone") -> Request:
    return changed(ImageBody.model_validate(WHOLE | body).to_request(card, name), keep_latents=True)


def theirs(folder: Path, card: Card, body: Body, patch: pytest.MonkeyPatch) -> torch.Tensor:
    pipeline, options = opened(folder), {"timestep_spacing": card.schedule.spacing}
    if "schedule" in body:
        options[f"use_{body['schedule']}_sigmas"] = True
    if body["sampler"] == "dpmpp_2m_sde":
        options["algorithm_type"] = "sde-dpmsolver++"
    scheduler = SCHEDULERS[body["sampler"]].from_config(pipeline.scheduler.config, **options)
    patch.setattr(pipeline, "scheduler", scheduler)
    # NOTE: StableDiffusionPipeline looks for the last norm where transformers had it before its version 5.
    patch.setattr(CLIPTextModel, "text_model", property(lambda encoder: encoder), raising=False)
    return run(pipeline, card, WHOLE | body)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_latents_are_those_of_the_pipeline(
    seed_models: Path, cards: dict[str, Card], pool: Pool, monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    """Alone, and among rows of its model with other samplers, schedules and layers of CLIP; a wrong one is far away."""
    name, body = CASES[case]
    card = cards[name]
    wanted = theirs(seed_models / name, card, body, monkeypatch)
    (ours,) = serve(pool, asked(card, body))
    close(final(ours), wanted, SAME)
    near = [asked(card, other | {"seed": seed}, f"near-{seed}") for seed, (_, other) in enumerate(CASES[5:])]
    ours = serve(pool, *near, asked(card, body))[-1]
    assert ours.timings.shared > 1
    close(final(ours), wanted, SAME)
    for wrong in wrongs(body):
        (other,) = serve(pool, asked(card, body | wrong))
        apart(final(other), wanted, SAME, of=wrong)


def wrongs(body: Body) -> list[dict[str, Any]]:
    """Each with another value of one field that these cases are about."""
    found: list[dict[str, Any]] = []
    if "schedule" in body:
        found += [{"schedule": None}, {"schedule": {"karras": "exponential"}.get(body["schedule"], "karras")}]
    if "clip_skip" in body:
        found += [{"clip_skip": 0}, {"clip_skip": body["clip_skip"] + 1}]
    return found or [{"num_inference_steps": body["num_inference_steps"] + 1}]
