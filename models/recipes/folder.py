"""Trained networks as diffusers folders: weights in bf16, scheduler, index, and the subjects that were learned.

Tokenizers and the VAE are there already, or are named by the card.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from data import Subject
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn


def export(model: nn.Module, out: Path, shift: float) -> None:
    """Write transformer, scheduler and index as diffusers does, the weights in bf16."""
    save_bf16(model, out / "transformer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).save_pretrained(out / "scheduler")
    write_index(out)


def save_bf16(module: nn.Module, folder: Path) -> None:
    """Write a network in bf16; its own weights stay what they are."""
    kept = {key: value.detach().clone() for key, value in module.state_dict().items()}
    module.to(torch.bfloat16).save_pretrained(folder)
    module.float().load_state_dict(kept)


def write_subjects(out: Path, subjects: Iterable[Subject]) -> None:
    """subjects.txt beside the card: what the network has seen, one name a line."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "subjects.txt").write_text("\n".join(s.name for s in subjects) + "\n")


def read_subjects(folder: Path, subjects: list[Subject]) -> list[Subject]:
    """Those of `subjects` that stand in the folder's subjects.txt; all of them where there is none."""
    file = folder / "subjects.txt"
    named = set(file.read_text().splitlines()) if file.exists() else {s.name for s in subjects}
    unknown = named - {s.name for s in subjects}
    if unknown:
        raise ValueError(f"{file} names no emoji: {sorted(unknown)}")
    return [s for s in subjects if s.name in named]


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
