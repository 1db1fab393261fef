"""What diffusers' two SDXL pipelines draw together, one up to a share of the noise and the other one from there on.

It uses nothing of the app: prompts, sizes, steps and scales are those of the body.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from tests.seeds.upstream import Body, opened_image

SCHEDULERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
}
Step = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@cache
def opened(folder: Path, kind: str) -> Any:
    """A pipeline of diffusers with the parts of a folder: from noise, or from a picture."""
    absent = {"text_encoder": None, "tokenizer": None} if "refiner" in folder.name else {}
    pipeline = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline").from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refined_latent(folder: Path, body: Body, **wrong: Any) -> torch.Tensor:
    """[1, C, h, w] float32, the final latent of the refiner. wrong: arguments of its pipeline that are others."""
    generator, refiner = torch.Generator().manual_seed(body["seed"]), body["refiner"]
    common = facts_of(body) | {"generator": generator, "callback_on_step_end": keeping(folder, body)}
    switch, second = refiner["switch_at"], opened(folder / refiner["model"], "Img2Img")
    start = {"strength": body["strength"], "image": opened_image(body["image"])} if "image" in body else {}
    if start and body["strength"] <= 1 - switch:
        return run(second, body["sampler"], **common, **start, **wrong)
    kind, size = ("Img2Img", {}) if start else ("", {"width": width(body), "height": height(body)})
    first = opened(folder / body["model"], kind)
    begun = run(first, body["sampler"], **common, **start, **size, denoising_end=switch)
    return run(second, body["sampler"], **{**common, "image": begun, "denoising_start": switch, **wrong})


@torch.no_grad()
def run(pipeline: Any, sampler: str, **arguments: Any) -> torch.Tensor:
    kind, options = SCHEDULERS[sampler]
    pipeline.scheduler = kind.from_config(opened_scheduler(pipeline), **options)
    latent: torch.Tensor = pipeline(**arguments, output_type="latent").images
    return latent


def opened_scheduler(pipeline: Any) -> dict[str, Any]:
    """What the folder's own scheduler says of the noise and of timesteps."""
    names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "timestep_spacing", "steps_offset")
    return {name: pipeline.scheduler.config[name] for name in names}


def facts_of(body: Body) -> dict[str, Any]:
    """The arguments that both pipelines have, sizes as (height, width).

    NOTE: the negative pass has the same crop here. By default it has that in the first pipeline, but in the img2img one
    none, unlike its other sizes.
    """
    facts = {name: body.get(name) for name in ("prompt", "negative_prompt", "guidance_scale", "num_inference_steps")}
    own = f"{width(body)}x{height(body)}"
    sizes = {name: body.get(name, own).split("x") for name in ("original_size", "target_size")}
    facts |= {name: (int(down), int(across)) for name, (across, down) in sizes.items()}
    crop = tuple(body.get("crop", (0, 0)))[::-1]
    return facts | {"crops_coords_top_left": crop, "negative_crops_coords_top_left": crop}


def width(body: Body) -> int:
    return int(body["size"].split("x")[0])


def height(body: Body) -> int:
    return int(body["size"].split("x")[1])


def keeping(folder: Path, body: Body) -> Step | None:
    """What puts the source back after each step where the mask keeps it, as noisy as the next step wants it.

    NOTE: the inpaint pipeline as a second one takes the noisy latents of the first for its source.
    """
    if "mask_image" not in body:
        return None
    vae = opened(folder / body["model"], "").vae
    pixels = torch.from_numpy(np.array(opened_image(body["image"]))).permute(2, 0, 1)[None].float() / 127.5 - 1
    generator = torch.Generator().manual_seed(body["seed"])
    with torch.no_grad():
        source = vae.encode(pixels).latent_dist.sample(generator) * vae.config.scaling_factor
    noise = torch.randn(source.shape, generator=generator)
    mask = torch.from_numpy(np.array(opened_image(body["mask_image"]))[::4, ::4] > 0)

    def keep(pipeline: Any, step: int, t: torch.Tensor, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        later = [one for one in pipeline.scheduler.timesteps if one < t]
        noisy = pipeline.scheduler.add_noise(source, noise, torch.stack(later[:1])) if later else source
        return {"latents": torch.where(mask, found["latents"], noisy)}

    return keep
