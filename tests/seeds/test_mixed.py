"""Every family through HTTP in mixed traffic against diffusers' pipelines: final latents, in float32, with controls.

One real server on loopback with its real engine process and all cards; everything is asked for at once.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from app.jobs.job import Job
from app.report import Result
from app.settings import Settings
from app.worker.supervisor import WORKER, Supervisor
from tests.parts.close import LEVELS, SAME, apart, beyond_rounding, close
from tests.parts.requests import changed
from tests.parts.servers import Server
from tests.seeds.upstream import Body, final_latent, picture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CLIENTS = 48
GUIDED = {"guidance_scale": 4.0, "negative_prompt": "green dog"}
TRUE = {"true_cfg_scale": 4.0, "negative_prompt": "green dog"}
SKIP = {f"skip_layer_guidance_{name}": value for name, value in (("scale", 2.8), ("start", 0.01), ("stop", 0.4))}
LONG = {"prompt": " ".join(["a small yellow flower"] * 12)}

UNETS = ("sd1.5", "sd2", "sdxl")

CASES: dict[str, Body] = {
    "dit guided": {"model": "dit", "size": "32x32", "num_inference_steps": 8, "guidance_scale": 4.0},
    "dit": {"model": "dit", "size": "32x32", "num_inference_steps": 5, "guidance_scale": 0.0},
    "dit odd": {"model": "dit-odd", "size": "40x40", "num_inference_steps": 10, "guidance_scale": 1.5},
    "sd3": {"model": "sd3", "size": "40x24", "num_inference_steps": 28, **GUIDED},
    "sd3 unguided": {"model": "sd3", "size": "40x24", "num_inference_steps": 4, "guidance_scale": 0.0},
    "sd3 short": {"model": "sd3", "size": "24x24", "num_inference_steps": 3, "max_sequence_length": 9, **GUIDED},
    "sd3 long": {"model": "sd3", "size": "64x16", "num_inference_steps": 6, **GUIDED, **LONG},
    "sd3 no t5": {"model": "sd3-no-t5", "size": "24x56", "num_inference_steps": 8, **GUIDED},
    "sd3 no clip": {"model": "sd3-no-clip", "size": "32x48", "num_inference_steps": 8, **GUIDED},
    "sd3.5 large": {"model": "sd3.5-large", "size": "56x40", "num_inference_steps": 10, **GUIDED},
    "sd3.5 turbo": {"model": "sd3.5-large", "size": "56x40", "num_inference_steps": 4, "guidance_scale": 0.0},
    "sd3.5 medium": {"model": "sd3.5-medium", "size": "40x24", "num_inference_steps": 6, **GUIDED},
    "sd3.5 skip": {"model": "sd3.5-medium", "size": "40x24", "num_inference_steps": 10, **GUIDED, **SKIP},
    "schnell": {"model": "schnell", "size": "40x24", "num_inference_steps": 4, "guidance_scale": 0.0},
    "schnell guided": {"model": "schnell", "size": "40x24", "num_inference_steps": 6, **GUIDED},
    "schnell no t5": {"model": "schnell-no-t5", "size": "24x40", "num_inference_steps": 4, **GUIDED, **LONG},
    "dev": {"model": "dev", "size": "40x24", "num_inference_steps": 10, "guidance_scale": 3.5},
    "dev at 1": {"model": "dev", "size": "40x24", "num_inference_steps": 5, "guidance_scale": 1.0},
    "dev true": {"model": "dev", "size": "40x24", "num_inference_steps": 8, "guidance_scale": 3.5, **TRUE},
    "dev long": {"model": "dev", "size": "16x56", "num_inference_steps": 4, "guidance_scale": 2.0, **LONG},
    "sd1.5": {"model": "sd15", "size": "40x24", "num_inference_steps": 20, **GUIDED},
    "sd2 absent": {"model": "sd2", "size": "24x56", "num_inference_steps": 10, "guidance_scale": 7.5},
    "sdxl": {"model": "sdxl", "size": "40x24", "num_inference_steps": 30, **GUIDED},
    "sdxl absent": {"model": "sdxl", "size": "40x24", "num_inference_steps": 8, "guidance_scale": 5.0},
    "sdxl empty": {"model": "sdxl", "size": "24x40", "num_inference_steps": 6, **GUIDED, "negative_prompt": ""},
    "sdxl long": {"model": "sdxl-deep", "size": "64x16", "num_inference_steps": 6, **GUIDED, **LONG},
    "sdxl turbo": {"model": "sdxl-turbo", "size": "40x24", "num_inference_steps": 4, "guidance_scale": 0.0},
    "dev no clip": {"model": "dev-no-clip", "size": "64x24", "num_inference_steps": 6, "guidance_scale": 3.5, **TRUE},
}
CONTROLS: list[tuple[str, Body]] = [
    ("dit guided", {"class_label": 4}),
    ("sd3", {"negative_prompt": "green cat"}),
    ("sd3.5 large", {"prompt": "a red apple on a blue house"}),
    ("sd3.5 skip", {"skip_layer_guidance_stop": 0.2}),
    ("schnell guided", {"prompt": "a red apple on a blue house"}),
    ("dev", {"true_cfg_scale": 2.0}),
    ("dev true", {"true_cfg_scale": 3.5}),
    ("dev true", {"guidance_scale": 3.0}),
    ("sd2 absent", {"negative_prompt": "green cat"}),
    ("sdxl absent", {"negative_prompt": ""}),
    ("sdxl empty", {"negative_prompt": None}),
]
SEEDED = ("dit guided", "sd3", "sd3.5 medium", "schnell", "dev", "sd1.5", "sdxl")
SCALED = ("dit guided", "sd3", "sd3.5 medium", "schnell guided", "dev", "sd1.5", "sdxl")
CONTROLS += [(name, {"seed": 12}) for name in SEEDED]
CONTROLS += [(name, {"guidance_scale": 3.0}) for name in SCALED]


def whole(name: str, **changes: Any) -> Body:
    """The body of a case: with a class or a prompt, and a seed."""
    condition: Body = {"class_label": 3} if name.startswith("dit") else {"prompt": "a red apple on a blue background"}
    return {**condition, "seed": 11, **CASES[name], **changes}


def neighbour(name: str, seed: int) -> Body:
    """A request of the case's model and size for another picture, with another sampler, steps and guidance."""
    sampler, steps = ("flow_heun", 3) if seed else ("flow_euler", 15)
    if name.startswith(UNETS):
        sampler = sampler.removeprefix("flow_")
    if name.startswith("dit"):
        return whole(name, class_label=207, sampler=("euler_ancestral", "ddpm")[seed], num_inference_steps=9, seed=seed)
    other = {"prompt": "moon and stars", "guidance_scale": (1.5, 6.0)[seed]}
    return whole(name, sampler=sampler, num_inference_steps=steps, seed=seed, **other)


@dataclass(frozen=True)
class Answer:
    """What came of one request. reply: the JSON body; result: what the engine process sent for it."""

    reply: dict[str, Any]
    result: Result

    @property
    def latent(self) -> torch.Tensor:
        return torch.from_numpy(self.result.latents)[None]

    @property
    def pixels(self) -> np.ndarray:
        """Of the PNG in the reply."""
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self.reply["data"][0]["b64_json"]))))


def keep_latents(supervisor: Supervisor) -> dict[str, Result]:
    """From now on every request keeps its latents; the results by request id, as they come.

    NOTE: a reply holds pictures, and no field of a body asks for latents. This one bit is set where the front hands a
    request to the engine process, in the test's process; all else is as for any client.
    """
    kept: dict[str, Result] = {}
    submit = supervisor.submit

    def keeping(job: Job, **options: Any) -> Job:
        job.request = changed(job.request, keep_latents=True)
        job.future.add_done_callback(lambda done: kept.update({job.request.id: done.result()[0]}))
        return submit(job, **options)

    supervisor.submit = keeping  # type: ignore[method-assign]
    return kept


def ask_all(url: str, bodies: dict[str, Body]) -> dict[str, dict[str, Any]]:
    """The replies to all of these at once, in an order of no meaning."""
    order = random.Random(5).sample(sorted(bodies), len(bodies))
    with httpx.Client(base_url=url, timeout=300, limits=httpx.Limits(max_connections=CLIENTS)) as http:

        def ask(name: str) -> dict[str, Any]:
            route = "edits" if "image" in bodies[name] else "generations"
            reply = http.post(f"/v1/images/{route}", json=bodies[name], headers={"X-Request-ID": name})
            assert reply.status_code == 200, f"{name}: {reply.text}"
            told: dict[str, Any] = reply.json()
            return told

        with ThreadPoolExecutor(CLIENTS) as clients:
            return dict(zip(order, clients.map(ask, order), strict=True))


@pytest.fixture(scope="module")
def answers(seed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Answer]]:
    """Every case ("case-0", ...), its two neighbours and the controls ("control-0", ...), asked for at once."""
    bodies = {f"case-{number}": whole(name) for number, name in enumerate(CASES)}
    bodies |= {f"near-{number}-{seed}": neighbour(name, seed) for number, name in enumerate(CASES) for seed in (0, 1)}
    bodies |= {f"control-{number}": whole(name, **wrong) for number, (name, wrong) in enumerate(CONTROLS)}
    cache = tmp_path_factory.mktemp("mixed")
    facts = {"devices": "cpu", "dtype": "float32", "threads": 1, "port": 0, "drain": 5, "max_wait": 1e6}
    server = Server(Settings(models=seed_models, cache=cache, **facts), WORKER)
    kept = keep_latents(server.supervisor)
    with server:
        replies = ask_all(server.url, bodies)
    results = {name.rpartition("-")[0]: result for name, result in kept.items()}
    assert results.keys() == bodies.keys()
    yield {name: Answer(replies[name], results[name]) for name in bodies}


@cache
def theirs(folder: Path, name: str) -> torch.Tensor:
    return final_latent(folder / CASES[name]["model"], whole(name))


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_the_pipeline(seed_models: Path, answers: dict[str, Answer], name: str) -> None:
    ours = answers[f"case-{list(CASES).index(name)}"]
    close(ours.latent, theirs(seed_models, name), SAME)


@pytest.mark.parametrize("name", CASES)
def test_the_picture_in_the_reply_is_that_latents(seed_models: Path, answers: dict[str, Answer], name: str) -> None:
    ours, body = answers[f"case-{list(CASES).index(name)}"], whole(name)
    assert ours.reply["size"] == body["size"] and ours.reply["data"][0]["seed"] == 11
    assert np.array_equal(ours.pixels, ours.result.pixels)
    image = picture(seed_models / body["model"], theirs(seed_models, name))
    close(ours.pixels, image, LEVELS, beyond_rounding)
    apart(ours.pixels[::-1], image, LEVELS, beyond_rounding)


@pytest.mark.parametrize(
    "number", range(len(CONTROLS)), ids=lambda number: f"{CONTROLS[number][0]} {CONTROLS[number][1]}"
)
def test_controls_are_told_from_the_pipeline(seed_models: Path, answers: dict[str, Answer], number: int) -> None:
    """A wrong class, prompt, seed or scale, in the same traffic, is 100 times the bound away and more."""
    apart(answers[f"control-{number}"].latent, theirs(seed_models, CONTROLS[number][0]), 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_that_is_cut_is_told_and_no_other(answers: dict[str, Answer], name: str) -> None:
    told, prompt = answers[f"case-{list(CASES).index(name)}"].reply.get("warnings"), CASES[name].get("prompt", "")
    if prompt != LONG["prompt"]:
        assert told is None
        return
    head, unseen, tail = told[0].split('"')
    assert len(told) == 1 and head == "the prompt is too long for the text encoder; not seen: " and not tail
    assert prompt.endswith(unseen) and 20 < len(unseen) < len(prompt) - 20


def test_the_traffic_was_mixed(answers: dict[str, Answer]) -> None:
    shared = [answers[f"case-{number}"].result.timings.shared for number in range(len(CASES))]
    print(shared)
    assert sum(many > 1 for many in shared) >= len(CASES) // 2
