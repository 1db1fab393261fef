"""A trained MMDiT as a diffusers folder: weights in bf16, scheduler, index; tokenizers and VAE are there already."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn


def export(model: nn.Module, encoders: Iterable[nn.Module], out: Path, shift: float) -> None:
    """Write transformer, encoders, scheduler and index as diffusers does, the weights in bf16."""
    names = {"transformer": "SD3Transformer2DModel", "text_encoder": "CLIPTextModelWithProjection"}
    names |= {"text_encoder_2": "CLIPTextModelWithProjection", "text_encoder_3": "T5EncoderModel"}
    for name, module in zip(names, [model, *encoders], strict=True):
        kept = {key: value.detach().clone() for key, value in module.state_dict().items()}
        module.to(torch.bfloat16).save_pretrained(out / name)
        module.float().load_state_dict(kept)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).save_pretrained(out / "scheduler")
    write_index(out)


def write_index(out: Path) -> None:
    """model_index.json, the classes that StableDiffusion3Pipeline loads for each folder."""
    kinds = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"]}
    kinds |= {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    kinds |= {name: ["transformers", "CLIPTextModelWithProjection"] for name in ("text_encoder", "text_encoder_2")}
    kinds |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    kinds |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    kinds |= {name: [None, None] for name in ("image_encoder", "feature_extractor")}
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1"} | dict(sorted(kinds.items()))
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
