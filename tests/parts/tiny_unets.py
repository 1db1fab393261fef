"""Tiny random U-Nets in the diffusers layout, with cards: `python -m tests.parts.tiny_unets FOLDER`.

    tiny-sd15           one CLIP, epsilon
    tiny-sd2            one CLIP that is padded with "!" and has another activation, velocity
    tiny-sdxl           two CLIPs, pooled text and sizes
    tiny-sdxl-turbo     tiny-sdxl on trailing timesteps, 4 steps, no guidance; its own network
    tiny-refiner        the second CLIP and the VAE of tiny-sdxl, pooled text, sizes and a score

All take 16x16 to 64x64 px in steps of 8; a latent pixel is 4 pixels wide, and they halve the latent twice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

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
{more}"""

_SCALED = 'betas = "scaled_linear", beta_start = 0.00085, beta_end = 0.012, steps_offset = 1, set_alpha_to_one = false'
_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **_NOISE}
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1, **_NOISE}

_ONE = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
_TWO = {**_ONE, "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
_SECOND = {part: _TWO[part] for part in ("vae", "text_encoder_2", "tokenizer_2")}

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
_SD2: dict[str, Any] = {
    **_SD,
    "use_linear_projection": True,
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 24,
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


_TURBO: dict[str, Any] = {**_EULER, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
_ZEROS = {"force_zeros_for_empty_prompt": True}
_SCORES: dict[str, Any] = {
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    **dict.fromkeys(("text_encoder", "tokenizer"), (None, None)),
}


class Kind(NamedTuple):
    """A kind of U-Net. network: its config. parts: the others, with their classes. scheduler: its config. index: more
    of model_index.json. prediction, sampler, steps, scale: of the card. seed: of the network."""

    network: dict[str, Any]
    parts: dict[str, str]
    pipeline: str
    scheduler: dict[str, Any]
    index: dict[str, Any]
    prediction: str = "epsilon"
    sampler: str = "ddim"
    steps: int = 8
    scale: float = 5.0
    seed: int = 0

    @property
    def scaling(self) -> float:
        """Of its VAE."""
        return 0.13025 if "text_encoder_2" in self.parts else 0.18215


_PLAIN, _LARGE = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
KINDS = {
    "sd15": Kind(_SD, _ONE, _PLAIN, _DDIM, {}),
    "sd2": Kind(_SD2, _ONE, _PLAIN, {**_DDIM, "prediction_type": "v_prediction"}, {}, prediction="v", seed=10),
    "sdxl": Kind(_XL, _TWO, _LARGE, _EULER, _ZEROS, sampler="euler", seed=20),
    "sdxl-turbo": Kind(_XL, _TWO, _LARGE, _TURBO, _ZEROS, "epsilon", "euler_ancestral", 4, 0.0, seed=30),
    "refiner": Kind(_REFINER, _SECOND, "StableDiffusionXLImg2ImgPipeline", _EULER, _SCORES, sampler="euler", seed=40),
}


def write_unets(folder: Path) -> None:
    """Write the five models under `folder`, the same bytes at every call."""
    for name in KINDS:
        write_unet(folder / f"tiny-{name}", name)


def write_unet(folder: Path, name: str, seed: int = 50, sdxl: str = "tiny-sdxl", **changes: Any) -> None:
    """A U-Net of this kind with its card, named as its folder. `changes` go to the network's config.

    sdxl: the id of the model that a refiner takes parts of, which are its own too.
    """
    from diffusers import UNet2DConditionModel

    kind = KINDS[name]
    write_network(UNet2DConditionModel(**{**kind.network, **changes}), folder / "unet", seed + kind.seed)
    write_vae(folder / "vae", seed + 1, scaling_factor=kind.scaling)
    first, second = (folder / "text_encoder", folder / "tokenizer"), (folder / "text_encoder_2", folder / "tokenizer_2")
    if name == "sd2":
        write_second_clip(*first, seed + 3, projection=False, hidden_act="gelu")
    elif "text_encoder" in kind.parts:
        write_pooled_clip(*first, seed + 2)
    if "text_encoder_2" in kind.parts:
        write_second_clip(*second, seed + 2, hidden_act="gelu")
    libraries = {"AutoencoderKL": "diffusers"}
    classes = {part: (libraries.get(one, "transformers"), one) for part, one in kind.parts.items()}
    classes |= {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "scheduler": ("diffusers", kind.scheduler["_class_name"]),
    }
    head = {"_class_name": kind.pipeline, "_diffusers_version": "0.42.1"}
    write_json(folder / "model_index.json", {**head, **classes, **kind.index})
    write_json(folder / "scheduler" / "scheduler_config.json", kind.scheduler)
    (folder / "card.toml").write_text(_card(folder.name, kind, sdxl), encoding="utf-8")


def _card(name: str, kind: Kind, sdxl: str) -> str:
    shared = kind.parts if kind.network is _REFINER else {}
    spacing = kind.scheduler.get("timestep_spacing", "leading")
    facts = {"force_zeros": kind.index is _ZEROS, "framing": "addition_embed_type" in kind.network}
    schedule = f'kind = "diffusion", prediction = "{kind.prediction}", spacing = "{spacing}", {_SCALED}'
    return CARD.format(
        id=name,
        components=", ".join(f'{part} = "{sdxl}/{part}"' for part in shared),
        schedule=schedule,
        sampler=kind.sampler,
        steps=kind.steps,
        guidance=kind.scale,
        more="".join(f"{name} = true\n" for name, holds in facts.items() if holds),
    )


if __name__ == "__main__":
    write_unets(Path(sys.argv[1]))
