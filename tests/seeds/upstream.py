"""What diffusers' pipelines make of the body of a request: the final latent, on the files of a tiny checkpoint.

It uses nothing of the app but its cards: prompts, sizes, steps and scales are the body's own words. A body with an
`image` (base64 of a PNG of the body's size) is drawn by the img2img pipeline, one with a `mask_image` too (white is
painted anew) by the inpaint pipeline.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad

from app.cards.card import Card, parse_size
from app.cards.cards import read_card

Body = dict[str, Any]

EDITS: dict[str, tuple[Any, Any]] = {
    "StableDiffusion3Pipeline": (
        diffusers.StableDiffusion3Img2ImgPipeline,
        diffusers.StableDiffusion3InpaintPipeline,
    ),
    "FluxPipeline": (diffusers.FluxImg2ImgPipeline, diffusers.FluxInpaintPipeline),
    "StableDiffusionPipeline": (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline),
    **dict.fromkeys(
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        (diffusers.StableDiffusionXLImg2ImgPipeline, diffusers.StableDiffusionXLInpaintPipeline),
    ),
}
"""The pipelines that start from a picture, and from a picture and a mask, by the one that starts from noise."""


FACTS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "requires_safety_checker")
"""What a model_index.json says of a pipeline besides its parts."""

FRAMING = ("original_size", "crops_coords_top_left", "target_size")
"""What SDXL's pipelines take of the framing, as (height, width) and (top, left)."""


@cache
def opened(folder: Path) -> Any:
    """The pipeline that the folder's model_index.json names, with the parts that it has."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    if index["_class_name"] == "StableDiffusionPipeline":
        absent |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def final_latent(folder: Path, body: Body) -> torch.Tensor:
    """[1, C, h, w] float32, as the pipeline's VAE would be given it, but for scale and shift."""
    return run(opened(folder), read_card(folder / "card.toml"), body)


@torch.no_grad()
def run(pipeline: Any, card: Card, body: Body) -> torch.Tensor:
    """`final_latent` of a pipeline that is there."""
    runs = {"DiTPipeline": _dit, "StableDiffusion3Pipeline": _sd3, "FluxPipeline": _flux}
    name = type(pipeline).__name__
    if "image" in body:
        facts = {key: pipeline.config[key] for key in FACTS if key in pipeline.config}
        pipeline = EDITS[name]["mask_image" in body](**pipeline.components, **facts)
        pipeline.set_progress_bar_config(disable=True)
    return runs.get(name, _unet)(pipeline, card, body)


@torch.no_grad()
def picture(folder: Path, latent: torch.Tensor) -> np.ndarray:
    """The pipeline's image of a final latent, float [H, W, 3] in 0..255, before it is rounded."""
    vae = opened(folder).vae
    scaled = latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    image: np.ndarray = (vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return image * 255.0


def _dit(pipeline: Any, card: Card, body: Body) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pipeline(
        [body["class_label"]],
        guidance_scale=body["guidance_scale"],
        generator=torch.Generator().manual_seed(body["seed"]),
        num_inference_steps=body["num_inference_steps"],
        output_type="np",
    )
    hook.remove()
    return seen[0] * pipeline.vae.config.scaling_factor


def _sd3(pipeline: Any, card: Card, body: Body) -> torch.Tensor:
    skip = {name: value for name, value in body.items() if name.startswith("skip_layer_guidance_")}
    if skip and card.skip_layer_guidance:
        skip["skip_guidance_layers"] = list(card.skip_layer_guidance.layers)
    if pipeline.text_encoder_2 is None:
        text = _sd3_without_second_clip(pipeline, card, body)
    else:
        text = {"prompt": body["prompt"], "negative_prompt": body.get("negative_prompt", "")}
    scale = body["guidance_scale"]
    latent: torch.Tensor = pipeline(**text, **_common(card, body), **skip, guidance_scale=scale).images
    return latent


def _sd3_without_second_clip(pipeline: Any, card: Card, body: Body) -> dict[str, torch.Tensor]:
    """encode_prompt of pipeline_stable_diffusion_3.py, with zeros for what the second CLIP (24 wide) would give."""
    config, found = pipeline.transformer.config, {}
    for name, text in (("", body["prompt"]), ("negative_", body.get("negative_prompt", ""))):
        clip, pooled = pipeline._get_clip_prompt_embeds(text, clip_model_index=0)
        t5 = pipeline._get_t5_prompt_embeds(text, max_sequence_length=length(card, body))
        states = pad(clip, (0, config.joint_attention_dim - clip.shape[-1]))
        found[f"{name}prompt_embeds"] = torch.cat([states, t5], dim=1)
        missing = config.pooled_projection_dim - pooled.shape[-1]
        found[f"{name}pooled_prompt_embeds"] = pad(pooled, (0, missing))
    return found


def _flux(pipeline: Any, card: Card, body: Body) -> torch.Tensor:
    """NOTE: true_cfg_scale is what an ordinary card calls guidance_scale; a network without embedding ignores that."""
    width, height = parse_size(body["size"])
    embedded = pipeline.transformer.config.guidance_embeds
    scale = {"guidance_scale": body["guidance_scale"]} if embedded else {}
    scale["true_cfg_scale"] = body.get("true_cfg_scale", 1.0) if embedded else body["guidance_scale"]
    if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
        text = _flux_with_zeros(pipeline, card, body)
    else:
        text = {"prompt": body["prompt"], "negative_prompt": body.get("negative_prompt", "")}
    packed = pipeline(**text, **_common(card, body), **scale).images
    latent: torch.Tensor = pipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor)
    return latent


def _flux_with_zeros(pipeline: Any, card: Card, body: Body) -> dict[str, torch.Tensor]:
    """encode_prompt of pipeline_flux.py, with zeros for what an absent encoder would give."""
    config, tokens, found = pipeline.transformer.config, length(card, body), {}
    for name, prompt in (("", body["prompt"]), ("negative_", body.get("negative_prompt", ""))):
        text = torch.zeros(1, tokens, config.joint_attention_dim)
        pooled = torch.zeros(1, config.pooled_projection_dim)
        if pipeline.text_encoder_2 is not None:
            text = pipeline._get_t5_prompt_embeds(prompt, max_sequence_length=tokens, dtype=torch.float32)
        if pipeline.text_encoder is not None:
            pooled = pipeline._get_clip_prompt_embeds(prompt)
        found |= {f"{name}prompt_embeds": text, f"{name}pooled_prompt_embeds": pooled}
    return found


def _unet(pipeline: Any, card: Card, body: Body) -> torch.Tensor:
    """NOTE: an absent negative prompt is not the empty one. Pipelines that start from a picture have its size."""
    common = _common(card, body)
    del common["max_sequence_length"]
    if isinstance(pipeline, (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionXLImg2ImgPipeline)):
        del common["width"], common["height"]
    more = {name: body[name] for name in ("clip_skip", *FRAMING) if name in body}
    if "clip_skip" in more and "text_encoder_2" not in pipeline.components:
        # The pipeline looks for the last norm where transformers had it before version 5.
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    text = {"prompt": body["prompt"], "negative_prompt": body.get("negative_prompt")}
    latent: torch.Tensor = pipeline(**text, **common, **more, guidance_scale=body["guidance_scale"]).images
    return latent


def _common(card: Card, body: Body) -> dict[str, Any]:
    width, height = parse_size(body["size"])
    return {
        "width": width,
        "height": height,
        "num_inference_steps": body["num_inference_steps"],
        "generator": torch.Generator().manual_seed(body["seed"]),
        "max_sequence_length": length(card, body),
        "output_type": "latent",
        **({"strength": body["strength"]} if "image" in body else {}),
        **{name: opened_image(body[name]) for name in ("image", "mask_image") if name in body},
    }


def opened_image(text: str) -> Image.Image:
    """The picture of a body's field."""
    return Image.open(BytesIO(base64.b64decode(text)))


def length(card: Card, body: Body) -> int:
    """Tokens that the longest text encoder is padded to."""
    return int(body.get("max_sequence_length", card.text.t5))
