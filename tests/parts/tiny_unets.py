"""Tiny random U-Nets in the diffusers layout, with cards: `python -m tests.parts.tiny_unets FOLDER`.

    tiny-sd15           one CLIP, epsilon
    tiny-sd2            one CLIP that is padded with "!" and has another activation, velocity
    tiny-sdxl           two CLIPs, pooled text and sizes
    tiny-sdxl-turbo     tiny-sdxl on trailing timesteps, 4 steps, no guidance
    tiny-refiner        the second CLIP and the VAE of tiny-sdxl, pooled text, sizes and a score

All take 16x16 to 64x64 px in steps of 8; a latent pixel is 4 pixels wide, and they halve the latent twice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.parts.tiny_parts import write_json, write_network, write_pooled_clip, write_second_clip, write_vae

CARD = """\
id = "{id}"
family = "unet"
source = {{ path = "." }}
components = {{ {components} }}
schedule = {{ {schedule} }}
defaults = {{ sampler = "{sampler}", num_inference_steps = {steps}, guidance_scale = {guidance}, size = "32x32" }}
limits = {{ num_inference_steps = 100, sizes = {{ min = 16, max = 64, multiple = 8 }} }}
text = {{ clip = 24 }}
bucket = {{ passes = 8, encode = 8, decode = 8 }}
"""

_SCALED = 'betas = "scaled_linear", beta_start = 0.00085, beta_end = 0.012, steps_offset = 1, set_alpha_to_one = false'
_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **_NOISE}
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1, **_NOISE}

_ONE = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
_TWO = {**_ONE, "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
_SECOND = ("vae", "text_encoder_2", "tokenizer_2")

_SD: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "sample_size": 8,
}
_XL: dict[str, Any] = {
    **_SD,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 16 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
_REFINER: dict[str, Any] = {**_XL, "cross_attention_dim": 24, "projection_class_embeddings_input_dim": 24 + 5 * 8}


def write_unets(folder: Path) -> None:
    """Write the five models under `folder`, the same bytes at every call."""
    for name in ("tiny-sd15", "tiny-sd2", "tiny-sdxl", "tiny-sdxl-turbo", "tiny-refiner"):
        write_unet(folder / name)


def write_unet(folder: Path, kind: str = "", seed: int = 50, **changes: Any) -> None:
    """A U-Net with its card, named as its folder. kind: one of the names above, "" for the folder's. `changes` go to
    the network's config. A turbo and a refiner take parts of the tiny-sdxl beside them."""
    write = {"sd15": _write_sd15, "sd2": _write_sd2, "sdxl": _write_sdxl}
    others = {"sdxl-turbo": _write_turbo, "refiner": _write_refiner}
    ({**write, **others})[(kind or folder.name).removeprefix("tiny-")](folder, seed, changes)


def _write_sd15(folder: Path, seed: int, changes: dict[str, Any]) -> None:
    _write_network(folder, seed, {**_SD, **changes})
    write_vae(folder / "vae", seed + 1, scaling_factor=0.18215)
    write_pooled_clip(folder / "text_encoder", folder / "tokenizer", seed + 2)
    _write_rest(folder, _ONE, "StableDiffusionPipeline", _DDIM)
    _write_card(folder, "ddim", 8, 5.0)


def _write_sd2(folder: Path, seed: int, changes: dict[str, Any]) -> None:
    config = {"use_linear_projection": True, "attention_head_dim": (1, 2, 4), "cross_attention_dim": 24, **changes}
    _write_network(folder, seed + 10, {**_SD, **config})
    write_vae(folder / "vae", seed + 11, scaling_factor=0.18215)
    write_second_clip(folder / "text_encoder", folder / "tokenizer", seed + 12, projection=False, hidden_act="gelu")
    _write_rest(folder, _ONE, "StableDiffusionPipeline", {**_DDIM, "prediction_type": "v_prediction"})
    _write_card(folder, "ddim", 8, 5.0, prediction="v")


def _write_sdxl(folder: Path, seed: int, changes: dict[str, Any]) -> None:
    _write_network(folder, seed + 20, {**_XL, **changes})
    write_vae(folder / "vae", seed + 21, scaling_factor=0.13025)
    write_pooled_clip(folder / "text_encoder", folder / "tokenizer", seed + 22)
    write_second_clip(folder / "text_encoder_2", folder / "tokenizer_2", seed + 22, hidden_act="gelu")
    _write_rest(folder, _TWO, "StableDiffusionXLPipeline", _EULER, force_zeros_for_empty_prompt=True)
    _write_card(folder, "euler", 8, 5.0, more="force_zeros = true\n")


def _write_turbo(folder: Path, seed: int, changes: dict[str, Any]) -> None:
    _write_network(folder, seed + 30, {**_XL, **changes})
    scheduler = {**_EULER, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    _write_rest(folder, {}, "StableDiffusionXLPipeline", scheduler, force_zeros_for_empty_prompt=True)
    _write_card(folder, "euler_ancestral", 4, 0.0, spacing="trailing", shared=tuple(_TWO), more="force_zeros = true\n")


def _write_refiner(folder: Path, seed: int, changes: dict[str, Any]) -> None:
    _write_network(folder, seed + 40, {**_REFINER, **changes})
    facts = {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    absent = {"text_encoder": (None, None), "tokenizer": (None, None)}
    _write_rest(folder, {}, "StableDiffusionXLImg2ImgPipeline", _EULER, **facts, **absent)
    _write_card(folder, "euler", 8, 5.0, shared=_SECOND)


def _write_network(folder: Path, seed: int, config: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    write_network(UNet2DConditionModel(**config), folder / "unet", seed)


def _write_rest(folder: Path, parts: dict[str, str], pipeline: str, scheduler: dict[str, Any], **facts: Any) -> None:
    """model_index.json and the scheduler's config."""
    libraries = {"AutoencoderKL": "diffusers"}
    classes = {part: (libraries.get(kind, "transformers"), kind) for part, kind in parts.items()}
    classes |= {"unet": ("diffusers", "UNet2DConditionModel"), "scheduler": ("diffusers", scheduler["_class_name"])}
    head = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    write_json(folder / "model_index.json", {**head, **classes, **facts})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def _write_card(
    folder: Path,
    sampler: str,
    steps: int,
    guidance: float,
    *,
    prediction: str = "epsilon",
    spacing: str = "leading",
    shared: tuple[str, ...] = (),
    more: str = "",
) -> None:
    components = ", ".join(f'{part} = "tiny-sdxl/{part}"' for part in shared)
    schedule = f'kind = "diffusion", prediction = "{prediction}", spacing = "{spacing}", {_SCALED}'
    facts = {"sampler": sampler, "steps": steps, "guidance": guidance, "components": components, "schedule": schedule}
    (folder / "card.toml").write_text(CARD.format(id=folder.name, **facts) + more, encoding="utf-8")


if __name__ == "__main__":
    write_unets(Path(sys.argv[1]))
