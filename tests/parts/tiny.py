"""Tiny random checkpoints in the diffusers layout, with cards: `python -m tests.parts.tiny FOLDER`.

It writes files with diffusers, transformers and safetensors alone.

    tiny-dit          class labels, learned sigma, 32x32 px
    tiny-dit-v        every component of tiny-dit, taken to predict the velocity
    tiny-dit-sample   every component of tiny-dit, taken to predict the clean latent
    tiny-sd3          two CLIPs and a T5, 16x16 to 64x64 px
    tiny-sd3-turbo    every component of tiny-sd3, 4 steps, no guidance
    tiny-sd3-no-t5    tiny-sd3 without its T5

`write_flux` writes FLUX.1 checkpoints, which are not among these.

Weights are drawn so that outputs are O(1) and depend visibly on text, time and class: as these networks are
initialised for training, a DiT's output would not depend on anything.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.parts.tiny_parts import (
    write_first_clip,
    write_json,
    write_network,
    write_pooled_clip,
    write_second_clip,
    write_t5,
    write_vae,
)

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "pink")
DIT_CLASSES = {
    "transformer": ("diffusers", "DiTTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
SD3_CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}

FLUX_CLASSES = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}

SD3_PARTS = tuple(part for part in SD3_CLASSES if part != "scheduler")

DIT_CARD = """\
id = "{id}"
family = "dit"
source = {{ path = "." }}
components = {{ {components} }}
schedule = {{ kind = "diffusion", prediction = "{prediction}", variance = "learned_range" }}
defaults = {{ sampler = "ddim", num_inference_steps = 8, guidance_scale = 4.0, size = "32x32" }}
limits = {{ num_inference_steps = 250, sizes = {{ min = 32, max = 32, multiple = 32, square = true }} }}
bucket = {{ passes = 8, encode = 8, decode = 8 }}
"""

SD3_CARD = """\
id = "{id}"
family = "sd3"
source = {{ path = "." }}
components = {{ {components} }}
schedule = {{ kind = "flow", shift = 3.0 }}
defaults = {{ sampler = "flow_euler", num_inference_steps = {steps}, guidance_scale = {guidance}, size = "32x32" }}
limits = {{ num_inference_steps = 100, sizes = {{ min = 16, max = 64, multiple = 16 }} }}
text = {{ clip = 24, t5 = 24 }}
bucket = {{ passes = 8, encode = 8, decode = 8 }}
"""

FLUX_CARD = """\
id = "{id}"
family = "flux"
source = {{ path = "." }}
schedule = {{ kind = "flow", spacing = "flux", {shift} }}
{guidance}defaults = {{ sampler = "flow_euler", num_inference_steps = 4, guidance_scale = {scale}, size = "32x32" }}
limits = {{ num_inference_steps = 100, sizes = {{ min = 16, max = 64, multiple = 8 }} }}
text = {{ clip = 24, t5 = {t5} }}
bucket = {{ passes = 8, encode = 8, decode = 8 }}
"""


def write_models(folder: Path) -> None:
    """Write the six models under `folder`, the same bytes at every call (about 1 MB)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_dit(folder / "tiny-dit")
    for prediction in ("v", "sample"):
        _write_dit_like(folder, prediction)
    write_sd3(folder / "tiny-sd3")
    without_t5 = tuple(part for part in SD3_PARTS if not part.endswith("_3"))
    for name, parts, steps, guidance in (("tiny-sd3-turbo", SD3_PARTS, 4, 0.0), ("tiny-sd3-no-t5", without_t5, 8, 4.0)):
        shared = ", ".join(f'{part} = "tiny-sd3/{part}"' for part in parts)
        _write_index(folder / name, {"scheduler": SD3_CLASSES["scheduler"]})
        write_json(folder / name / "scheduler" / "scheduler_config.json", _FLOW)
        card = SD3_CARD.format(id=name, components=shared, steps=steps, guidance=guidance)
        (folder / name / "card.toml").write_text(card, encoding="utf-8")


_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False, "num_train_timesteps": 1000}


def write_dit(folder: Path, *, classes: int = 10, seed: int = 0, **changes: Any) -> None:
    """A DiT of `classes` classes with its card; `changes` go to the network's config."""
    from diffusers import DiTTransformer2DModel

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": classes,
    }
    write_network(DiTTransformer2DModel(**{**config, **changes}), folder / "transformer", seed)
    write_vae(folder / "vae", seed + 1, scaling_factor=0.8)
    write_json(folder / "scheduler" / "scheduler_config.json", _DDIM)
    _write_index(folder, DIT_CLASSES, pipeline="DiTPipeline", id2label=_named(classes))
    card = DIT_CARD.format(id="tiny-dit", prediction="epsilon", components="")
    (folder / "card.toml").write_text(card, encoding="utf-8")


def _write_dit_like(folder: Path, prediction: str) -> None:
    """A card with tiny-dit's components, the file of its class names, and another prediction."""
    name = f"tiny-dit-{prediction}"
    _write_index(
        folder / name, {"scheduler": DIT_CLASSES["scheduler"]}, pipeline="DiTPipeline", id2label=_named(len(COLOURS))
    )
    scheduler = {**_DDIM, "prediction_type": {"v": "v_prediction"}.get(prediction, prediction)}
    write_json(folder / name / "scheduler" / "scheduler_config.json", scheduler)
    shared = ", ".join(f'{part} = "tiny-dit/{part}"' for part in DIT_CLASSES if part != "scheduler")
    card = DIT_CARD.format(id=name, prediction=prediction, components=shared)
    (folder / name / "card.toml").write_text(card, encoding="utf-8")


def _named(classes: int) -> dict[str, str]:
    return {str(i): COLOURS[i] if i < len(COLOURS) else f"class {i}" for i in range(classes)}


def write_sd3(
    folder: Path, *, seed: int = 10, name: str = "tiny-sd3", leave_out: tuple[str, ...] = (), **changes: Any
) -> None:
    """An SD3 with its card. `leave_out` names encoders ("text_encoder_3"); `changes` go to the network's config."""
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 40,
        "pos_embed_max_size": 12,
    }
    write_network(SD3Transformer2DModel(**{**config, **changes}), folder / "transformer", seed)
    channels = int(changes.get("in_channels", 4))
    write_vae(folder / "vae", seed + 1, scaling_factor=1.5305, shift_factor=0.0609, latent_channels=channels)
    index: dict[str, tuple[str | None, str | None]] = {**SD3_CLASSES}
    writers = {"text_encoder": write_first_clip, "text_encoder_2": write_second_clip, "text_encoder_3": write_t5}
    for part, write in writers.items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        if part in leave_out:
            index[part] = index[tokenizer] = (None, None)
        else:
            write(folder / part, folder / tokenizer, seed + 2)
    write_json(folder / "scheduler" / "scheduler_config.json", _FLOW)
    _write_index(folder, index)
    (folder / "card.toml").write_text(SD3_CARD.format(id=name, components="", steps=8, guidance=4.0), encoding="utf-8")


_FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
_SCHNELL = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
_DEV = {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8)}


def write_flux(
    folder: Path, *, dev: bool, seed: int = 30, leave_out: tuple[str, ...] = (), tokens: int = 64, **changes: Any
) -> None:
    """A FLUX.1 with its card, named as its folder: like schnell, or like dev, which has embedded guidance and a shift
    that grows to its most at `tokens`. `leave_out` names encoders; `changes` go to the network's config."""
    from diffusers import FluxTransformer2DModel

    config = {
        "in_channels": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 16,
        "guidance_embeds": dev,
        **(_DEV if dev else _SCHNELL),
    }
    write_network(FluxTransformer2DModel(**{**config, **changes}), folder / "transformer", seed)
    write_vae(folder / "vae", seed + 1, **_FLUX_VAE)
    index: dict[str, tuple[str | None, str | None]] = {**FLUX_CLASSES}
    for part, write in {"text_encoder": write_pooled_clip, "text_encoder_2": write_t5}.items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        if part in leave_out:
            index[part] = index[tokenizer] = (None, None)
        else:
            write(folder / part, folder / tokenizer, seed + 2)
    _write_index(folder, index, pipeline="FluxPipeline")
    scheduler, shift = {**_FLOW, "shift": 1.0}, "shift = 1.0"
    if dev:
        line = {"base_image_seq_len": 4, "max_image_seq_len": tokens, "base_shift": 0.5, "max_shift": 1.15}
        scheduler |= {"use_dynamic_shifting": True, **line}
        shift = f"dynamic_shift = {{ base_tokens = 4, max_tokens = {tokens}, base = 0.5, max = 1.15 }}"
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    guidance, scale, t5 = ('guidance = "embedded"\n', 3.5, 32) if dev else ("", 0.0, 24)
    card = FLUX_CARD.format(id=folder.name, shift=shift, guidance=guidance, scale=scale, t5=t5)
    (folder / "card.toml").write_text(card, encoding="utf-8")


def _write_index(
    folder: Path, parts: dict[str, Any], *, pipeline: str = "StableDiffusion3Pipeline", **extra: Any
) -> None:
    write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.42.1", **parts, **extra})


if __name__ == "__main__":
    write_models(Path(sys.argv[1]))
    print(f"wrote {', '.join(sorted(path.name for path in Path(sys.argv[1]).iterdir()))}")
