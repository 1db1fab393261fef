"""LoRA through HTTP in mixed traffic against diffusers: final latents in float32, with controls.

Files that diffusers reads are loaded by its pipelines (`load_lora_weights`, `set_adapters`). Those that it does not
read at this size, and those of a T5 or a DiT, are added to the weights by `tests.parts.loras`, which is compared with
the pipelines on files that both read. One real server with its real engine process; everything is asked for at once.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.cards import read_card
from app.samplers.table import SAMPLERS
from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.parts.close import SAME, apart, close
from tests.parts.edits import as_field, half_mask, picture
from tests.parts.loras import Fault, loaded, merged, write_lora
from tests.parts.servers import Server
from tests.seeds.plain_edits import plain_latent
from tests.seeds.test_edits import mask_of
from tests.seeds.test_mixed import Answer, ask_all, keep_latents
from tests.seeds.upstream import Body, opened, opened_image, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),  # two adapters in one encoder
]

FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3-blocks": ("sd3-16", {}),
    "sd3-clips": ("sd3-16", {"only": r"^transformer.*attn|^text_encoder(_2)?\.", "ranks": (3,), "alpha": 8.0}),
    "sd3-t5": ("sd3-16", {"only": r"^text_encoder_3\.|\.1\.ff", "ranks": (8, 1), "size": 0.6}),
    "sd3-kohya": ("sd3-16", {"format": "kohya", "only": "^lora_", "alpha": 1.0}),
    "sd3-sparse": ("sd3-16", {"format": "kohya", "ranks": (2,), "alpha": 5.0, "sparse": True}),
    "medium-kohya": ("sd3.5-medium", {"format": "kohya", "only": "^lora_(unet|te2)", "alpha": 3.0}),
    "schnell-clip": ("schnell", {"only": r"^(transformer|text_encoder)\."}),
    "schnell-kohya": ("schnell", {"format": "kohya", "only": "^lora_", "alpha": 2.0}),
    "schnell-xlabs": ("schnell", {"format": "xlabs", "size": 0.8}),
    "dev-blocks": ("dev", {"ranks": (5,), "alpha": 2.0}),
    "dev-kohya": ("dev", {"format": "kohya", "only": "^lora_", "ranks": (6, 4), "alpha": 3.0, "sparse": True}),
    "dev-xlabs": ("dev", {"format": "xlabs", "size": 0.8}),
    "dit-blocks": ("dit", {}),
    "dit-attention": ("dit", {"only": r"attn1\.to_(q|k|v)", "ranks": (7,), "alpha": 3.0, "size": 0.8}),
}
"""The model of each file, and how it is written."""

UPSTREAM = ("sd3-blocks", "sd3-clips", "schnell-clip", "schnell-xlabs", "dev-blocks", "dev-xlabs")
"""Files that diffusers' pipelines load, whole and at this size."""

SUBJECT: Body = {"prompt": "a red apple on a blue background", "negative_prompt": "green dog"}
MODELS: dict[str, Body] = {
    "sd3-16": {**SUBJECT, "size": "56x40", "sampler": "flow_euler"},
    "sd3.5-medium": {**SUBJECT, "size": "40x24", "sampler": "flow_euler"},
    "schnell": {**SUBJECT, "size": "40x24", "sampler": "flow_euler"},
    "dev": {**SUBJECT, "size": "24x56", "sampler": "flow_euler"},
    "dit": {"class_label": 3, "size": "32x32", "sampler": "ddim"},
}
SKIP = {f"skip_layer_guidance_{name}": value for name, value in (("scale", 2.8), ("start", 0.01), ("stop", 0.4))}
STACKS: tuple[dict[str, float], ...] = (
    *({name: 0.8} for name in FILES),
    {"sd3-blocks": -0.7},
    {"sd3-blocks": 0.5, "sd3-clips": 1.2},
    {"sd3-clips": 0.6, "sd3-kohya": -0.4, "sd3-t5": 1.5},
    {"sd3-sparse": 2.0, "sd3-kohya": 0.3},
    {"medium-kohya": -1.1},
    {"schnell-clip": 0.7, "schnell-xlabs": 1.4},
    {"schnell-kohya": -0.5, "schnell-xlabs": -1.0},
    {"dev-blocks": 0.9, "dev-xlabs": -0.8},
    {"dev-kohya": 1.5, "dev-blocks": 0.4},
    {"dit-blocks": 0.6, "dit-attention": -1.3},
)
"""What a request asks for: weights by name."""


def body_of(stack: dict[str, float], scale: float = 4.0, **changes: Any) -> Body:
    """The body of a request with these adapters, all of one model. scale: of guidance, 0 for none."""
    (model,) = {FILES[name][0] for name in stack}
    guidance = {"guidance_scale": 3.5, "true_cfg_scale": scale or 1.0} if model == "dev" else {"guidance_scale": scale}
    loras = [{"name": name, "weight": weight} for name, weight in stack.items()]
    facts = {"model": model, "seed": 11, "num_inference_steps": 8, "loras": loras}
    return {**facts, **guidance, **MODELS[model], **changes}


def started(body: Body, strength: float, masked: bool, **changes: Any) -> Body:
    """The body, starting from a picture, and with a mask where it is masked."""
    size: tuple[int, ...] = tuple(map(int, body["size"].split("x")))
    mask = {"mask_image": as_field(half_mask(*size))} if masked else {}
    return {**body, "image": as_field(picture(*size)), "strength": strength, **mask, **changes}


def _cases() -> dict[str, Body]:
    cases: dict[str, Body] = {}
    for number, stack in enumerate(STACKS):
        name = " + ".join(f"{weight} {name}" for name, weight in stack.items())
        cases[name] = body_of(stack, num_inference_steps=6 + number % 5)
        cases[f"{name}, unguided"] = body_of(stack, 0.0, seed=12)
        if body_of(stack)["model"] != "sd3.5-medium":  # of 4 channels, which diffusers' inpaint pipeline does not take
            cases[f"{name}, from a picture"] = started(body_of(stack, num_inference_steps=10), 0.6, masked=False)
            cases[f"{name}, masked"] = started(body_of(stack, num_inference_steps=10), 0.7, masked=True)
    for number, (sampler, (_, _, predictions)) in enumerate(SAMPLERS.items()):
        stack = {"sd3-clips": 0.6, "sd3-kohya": -0.4} if "flow" in predictions else {"dit-blocks": 0.6}
        cases[sampler] = started(
            body_of(stack, sampler=sampler, num_inference_steps=15, seed=5), (1.0, 0.6)[number % 2], number % 3 == 0
        )
    cases["medium-kohya, skipping layers"] = body_of({"medium-kohya": 0.9}, num_inference_steps=10, **SKIP)
    return cases


CASES = _cases()
ALPHA = (
    "sd3-clips",
    "sd3-kohya",
    "sd3-sparse",
    "medium-kohya",
    "schnell-kohya",
    "dev-blocks",
    "dev-kohya",
    "dit-attention",
)
TEXT = ("sd3-clips", "sd3-t5", "sd3-kohya", "medium-kohya", "schnell-clip", "schnell-kohya", "dev-kohya")
"""Files with an alpha that is not the rank, and those with a part for text encoders."""

QUERIES = [name for name in FILES if name != "sd3-t5"]
CONTROLS: list[tuple[str, Fault, float]] = [
    *((f"0.8 {name}", "alpha", 0.0) for name in ALPHA),
    *((f"0.8 {name}", "text", 0.0) for name in TEXT),
    *((f"0.8 {name}", "qk", 0.0) for name in QUERIES),
    *((f"0.8 {name}", "", 0.05) for name in FILES),
    *((f"0.8 {name}", "", -0.8) for name in FILES),
    ("0.5 sd3-blocks + 1.2 sd3-clips", "text", 0.0),
    ("0.5 sd3-blocks + 1.2 sd3-clips, from a picture", "", 0.05),
    ("0.6 sd3-clips + -0.4 sd3-kohya + 1.5 sd3-t5, masked", "alpha", 0.0),
]
"""A case, a fault in reading its files, and what is added to all weights; -0.8 leaves nothing of the adapter."""


@pytest.fixture(scope="module")
def loras(seed_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, (name, (model, how)) in enumerate(FILES.items()):
        write_lora(folder / f"{name}.safetensors", seed_models / model, seed=seed, **how)
    return folder


@pytest.fixture(scope="module")
def answers(seed_models: Path, loras: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Every case, among requests of its model and size with other adapters or none."""
    bodies = {f"case-{number}": body for number, body in enumerate(CASES.values())}
    for number, stack in enumerate(STACKS):
        body = body_of(stack)
        flow = body["model"] != "dit"
        for seed, sampler in enumerate(("flow_heun", "flow_dpmpp_2m") if flow else ("heun", "euler_ancestral")):
            near = {"sampler": sampler, "seed": seed, "num_inference_steps": 9 + seed, "guidance_scale": 1.5 * seed}
            loras_ = [{**one, "weight": 0.3 + seed} for one in body["loras"][seed:]]
            bodies[f"near-{number}-{seed}"] = {**body, **near, "loras": loras_}
    facts = {"devices": "cpu", "dtype": "float32", "threads": 1, "port": 0, "drain": 5, "max_wait": 1e6}
    cache = tmp_path_factory.mktemp("cache")
    server = Server(Settings(models=seed_models, loras=str(loras), cache=cache, **facts), WORKER)
    kept = keep_latents(server.supervisor)
    with server:
        replies = ask_all(server.ready().url, bodies)
    results = {name.rpartition("-")[0]: result for name, result in kept.items()}
    assert results.keys() == bodies.keys()
    return {name: Answer(replies[f"case-{number}"], results[f"case-{number}"]) for number, name in enumerate(CASES)}


@cache
def theirs(
    models: Path, loras: Path, name: str, fault: Fault = "", more: float = 0.0, here: bool = False
) -> torch.Tensor:
    """here: by weights that this test adds, also where diffusers reads the files."""
    body = CASES[name]
    folder = models / body["model"]
    files = [(loras / f"{one['name']}.safetensors", one["weight"] + more) for one in body["loras"]]
    upstream = not fault and not here and all(one["name"] in UPSTREAM for one in body["loras"])
    if upstream and body["sampler"] == "flow_euler":
        return run(loaded(opened(folder), files), read_card(folder / "card.toml"), body)
    pipeline = merged(opened(folder), folder, files, fault)
    if "image" in body and body["sampler"] != "flow_euler":
        return plain_latent(folder, body, pipeline=pipeline)
    return run(pipeline, read_card(folder / "card.toml"), body)


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_diffusers(seed_models: Path, loras: Path, answers: dict[str, Answer], name: str) -> None:
    close(answers[name].latent, theirs(seed_models, loras, name), SAME)


@pytest.mark.parametrize(("name", "fault", "more"), CONTROLS)
def test_faults_are_told_from_diffusers(
    seed_models: Path, loras: Path, answers: dict[str, Answer], name: str, fault: Fault, more: float
) -> None:
    apart(answers[name].latent, theirs(seed_models, loras, name, fault, more, True), SAME)


@pytest.mark.parametrize(
    "name", [name for name, body in CASES.items() if {o["name"] for o in body["loras"]} <= {*UPSTREAM}]
)
def test_added_weights_are_what_the_pipelines_load(seed_models: Path, loras: Path, name: str) -> None:
    """The plain twin of `load_lora_weights`, for the files that diffusers does not read."""
    close(theirs(seed_models, loras, name, here=True), theirs(seed_models, loras, name), SAME)


def test_the_traffic_was_mixed(answers: dict[str, Answer]) -> None:
    shared = [answer.result.timings.shared for answer in answers.values()]
    assert sum(many > 1 for many in shared) >= len(CASES) // 2


@pytest.mark.parametrize("name", [name for name, body in CASES.items() if "mask_image" in body])
def test_pixels_outside_the_mask_are_exactly_those_of_the_picture(answers: dict[str, Answer], name: str) -> None:
    kept = mask_of(CASES[name]) == 0
    assert np.array_equal(answers[name].pixels[kept], np.array(opened_image(CASES[name]["image"]))[kept])
