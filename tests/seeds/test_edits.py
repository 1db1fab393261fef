"""Images that start from a picture, through HTTP in mixed traffic, against diffusers: final latents, with controls.

SD3, FLUX and the U-Nets with the sampler of their scheduler against the img2img and inpaint pipelines; a DiT, and the
solvers that no pipeline runs, against a plain loop in float64. One real server with its real engine process; everything
is asked for at once.
"""

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
from app.jobs.edit import PICTURES, read_edit, with_source
from app.pool.pool import Pool
from app.request import Request, Source
from app.samplers.table import SAMPLERS
from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.parts.close import SAME, apart, close
from tests.parts.edits import as_field, grown, half_mask, picture
from tests.parts.engine import Bench, load_all
from tests.parts.requests import changed
from tests.parts.servers import Server
from tests.seeds.plain_edits import FAULTS, Fault, faulty, plain_latent
from tests.seeds.test_mixed import Answer, ask_all, keep_latents
from tests.seeds.upstream import Body, final_latent, opened_image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

STRENGTHS = (0.1, 0.3, 0.6, 0.99, 1.0)
SUBJECT: Body = {"prompt": "a red apple on a blue background", "negative_prompt": "green dog"}
MODELS: dict[str, Body] = {
    "sd3-16": {**SUBJECT, "size": "56x40", "num_inference_steps": 28, "sampler": "flow_euler"},
    "schnell": {**SUBJECT, "size": "40x24", "num_inference_steps": 14, "sampler": "flow_euler"},
    "dev": {**SUBJECT, "size": "24x56", "num_inference_steps": 12, "sampler": "flow_euler"},
    "dit": {"class_label": 3, "size": "32x32", "num_inference_steps": 28, "sampler": "ddim"},
    "sd2": {**SUBJECT, "size": "40x24", "num_inference_steps": 15, "sampler": "ddim"},
    "sdxl": {**SUBJECT, "size": "24x56", "num_inference_steps": 12, "sampler": "euler"},
    "refiner": {**SUBJECT, "size": "40x24", "num_inference_steps": 12, "sampler": "euler"},
}
UNETS = ("sd2", "sdxl", "refiner")


def body_of(model: str, strength: float = 0.6, masked: bool = True, scale: float = 4.0, **changes: Any) -> Body:
    """The body of an edit; scale: of guidance, 0 for none. FLUX.1-dev has its embedded scale besides."""
    width, height = map(int, MODELS[model]["size"].split("x"))
    guidance = {"guidance_scale": 3.5, "true_cfg_scale": scale or 1.0} if model == "dev" else {"guidance_scale": scale}
    mask = {"mask_image": as_field(half_mask(width, height))} if masked else {}
    facts = {"model": model, "seed": 11, "strength": strength, "image": as_field(picture(width, height))}
    return {**facts, **mask, **guidance, **MODELS[model], **changes}


def _cases() -> dict[str, Body]:
    cases = {}
    for masked in (False, True):
        for model in MODELS:
            for scale in (0.0, 4.0):
                for strength in STRENGTHS:
                    name = f"{model} {strength} {'masked' if masked else 'whole'} {scale}"
                    cases[name] = body_of(model, strength, masked, scale)
        for sampler, (_, _, predictions) in SAMPLERS.items():
            model = "sd3-16" if "flow" in predictions else "dit"
            name = f"{sampler} {'masked' if masked else 'whole'}"
            cases[name] = body_of(model, 0.6, masked, sampler=sampler, num_inference_steps=15, seed=5)
    for model in MODELS:
        width, height = map(int, MODELS[model]["size"].split("x"))
        cases[f"{model} off the grid"] = body_of(model, mask_image=as_field(half_mask(width, height, 1)))
    return cases


CASES = _cases()
CONTROLS = [(f"{model} 0.6 masked 4.0", fault) for model in MODELS for fault in FAULTS]
CONTROLS += [(f"{sampler} masked", fault) for sampler in SAMPLERS for fault in ("later", "earlier", "inverted")]


def mask_of(body: Body) -> np.ndarray:
    return np.array(opened_image(body["mask_image"]))


def asked(card: Card, body: Body, name: str) -> Request:
    fields = {key: value for key, value in body.items() if key not in PICTURES}
    mask = mask_of(body).tobytes() if "mask_image" in body else None
    source = Source(np.array(opened_image(body["image"])).tobytes(), mask)
    return changed(with_source(read_edit(fields).to_request(card, name), source), keep_latents=True)


@pytest.fixture(scope="module")
def cards(seed_models: Path) -> dict[str, Card]:
    return {name: card for name, card in read_cards(seed_models).items() if name in MODELS}


@pytest.fixture(scope="module")
def pool(cards: dict[str, Card]) -> Iterator[Pool]:
    loaded = load_all(Pool(cards, "cpu", torch.float32))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def answers(seed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Every case, and requests for its model and size that do not start from a picture, asked for at once."""
    bodies = {f"case-{number}": body for number, body in enumerate(CASES.values())}
    for number, model in enumerate(MODELS):
        for seed in range(6):
            plain = body_of(model, scale=4.0 * (seed % 2), seed=seed, num_inference_steps=20 + seed)
            started = ("image", "mask_image", "strength")
            bodies[f"near-{number}-{seed}"] = {key: value for key, value in plain.items() if key not in started}
    cache = tmp_path_factory.mktemp("edits")
    facts = {"devices": "cpu", "dtype": "float32", "threads": 1, "port": 0, "drain": 5, "max_wait": 1e6}
    server = Server(Settings(models=seed_models, cache=cache, **facts), WORKER)
    kept = keep_latents(server.supervisor)
    with server:
        replies = ask_all(server.url, bodies)
    results = {name.rpartition("-")[0]: result for name, result in kept.items()}
    assert results.keys() == bodies.keys()
    return {name: Answer(replies[f"case-{number}"], results[f"case-{number}"]) for number, name in enumerate(CASES)}


@pytest.fixture(scope="module")
def ours(answers: dict[str, Answer]) -> dict[str, torch.Tensor]:
    """The final latents of every case."""
    return {name: answer.latent for name, answer in answers.items()}


@cache
def theirs(folder: Path, name: str, fault: Fault = "", grow: bool = True) -> torch.Tensor:
    """NOTE: of a mask in whole latents; of any other, diffusers asks the first pixel of each latent alone."""
    body, folder = CASES[name], folder / CASES[name]["model"]
    if "mask_image" in body and grow:
        body = {**body, "mask_image": as_field(grown(mask_of(body)))}
    if body["sampler"] != "flow_euler" and body["model"] not in UNETS:
        return plain_latent(folder, body, fault)
    with faulty(fault, body) as wrong:
        return final_latent(folder, wrong)


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_diffusers(seed_models: Path, ours: dict[str, torch.Tensor], name: str) -> None:
    """Where there is a mask, inside it and outside it too: what is drawn anew may be far larger than what is kept."""
    wanted = theirs(seed_models, name)
    close(ours[name], wanted, SAME)
    if "mask_image" in CASES[name]:
        mask = torch.from_numpy(grown(mask_of(CASES[name]))[::4, ::4] > 0)
        for part in (mask, ~mask):
            close(ours[name][..., part], wanted[..., part], SAME)


@pytest.mark.parametrize(("name", "fault"), CONTROLS)
def test_faults_are_told_from_diffusers(
    seed_models: Path, ours: dict[str, torch.Tensor], name: str, fault: Fault
) -> None:
    apart(ours[name], theirs(seed_models, name, fault), SAME)


@pytest.mark.parametrize("model", MODELS)
def test_a_mask_off_the_grid_is_more_than_its_first_pixels(
    seed_models: Path, ours: dict[str, torch.Tensor], model: str
) -> None:
    name = f"{model} off the grid"
    apart(ours[name], theirs(seed_models, name, grow=False), SAME)


def test_the_traffic_was_mixed(answers: dict[str, Answer]) -> None:
    shared = [answer.result.timings.shared for answer in answers.values()]
    assert sum(many > 1 for many in shared) >= len(CASES) // 2


@pytest.mark.parametrize("name", [name for name, body in CASES.items() if "mask_image" in body])
def test_pixels_outside_the_mask_are_exactly_those_of_the_picture(answers: dict[str, Answer], name: str) -> None:
    """In the PNG of the reply; inside they are what was drawn."""
    body, drawn = CASES[name], answers[name].pixels
    kept, before = mask_of(body) == 0, np.array(opened_image(body["image"]))
    assert np.array_equal(drawn[kept], before[kept])
    assert (drawn[~kept] != before[~kept]).any(axis=-1).mean() > 0.9


def test_deterministic_mode_is_bit_equal_alone_and_among_others(cards: dict[str, Card], pool: Pool) -> None:
    rows = [asked(cards[body["model"]], body, name) for name, body in CASES.items() if body["strength"] == 0.6]
    together = Bench(pool, deterministic=True).run(rows)
    assert {tick.passes for tick in together.forwards} == {8} and max(tick.rows for tick in together.forwards) > 1
    for row in rows:
        alone = Bench(pool, deterministic=True).run([row])
        assert np.array_equal(alone.results[row.id, 0].latents, together.results[row.id, 0].latents), row.id
