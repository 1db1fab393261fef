"""Tiny LoRA files for U-Nets and their CLIPs in the formats of their trainers, and what they add, by plain code."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from tests.parts import originals

Format = Literal["kohya", "sgm", "peft", "old"]
"""sd-scripts with diffusers' names (SD 1 and 2), with the authors' (SDXL); diffusers since 0.20, and before."""
Pairs = Mapping[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]
"""(part, module) -> (down, up), of its module's shape: [r, in] and [out, r], or [r, in, h, w] and [out, r, 1, 1]."""

SUFFIXES: dict[Format, tuple[str, str]] = {
    **dict.fromkeys(("kohya", "sgm"), (".lora_down.weight", ".lora_up.weight")),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "old": (".down.weight", ".up.weight"),
}
TEXT = ("text_encoder", "text_encoder_2")


def layers(model: Path) -> dict[tuple[str, str], torch.Tensor]:
    """The weights of linear layers and convolutions of a folder's U-Net and CLIPs."""
    found = {}
    for part in ("unet", *(part for part in TEXT if (model / part).is_dir())):
        for name, value in originals.read(model / part).items():
            if value.ndim > 1 and name.endswith(".weight") and "embedding.weight" not in name:
                found[part, name.removesuffix(".weight")] = value
    return found


def draw(model: Path, only: str, ranks: Sequence[int] = (4, 2), size: float = 0.4, seed: int = 0) -> Pairs:
    """Pairs for the layers with these names, "<part>.<module>". ranks: in turns. size: as a share of the weights."""
    dice, found = torch.Generator().manual_seed(seed), {}
    chosen = [(key, value) for key, value in layers(model).items() if re.search(only, ".".join(key))]
    assert chosen, f"{model} has no layers {only}"
    for number, (key, value) in enumerate(chosen):
        rank = ranks[number % len(ranks)]
        down = torch.randn(rank, *value.shape[1:], generator=dice) * value[0].numel() ** -0.5
        up = torch.randn(len(value), rank, *[1] * (value.ndim - 2), generator=dice) * size * rank**-0.5
        found[key] = down, up
    return found


def write(file: Path, model: Path, format: Format, pairs: Pairs, alpha: float | None = None) -> Path:
    """Write the file. alpha: of every layer, for sd-scripts; in the metadata, with one rank, for peft."""
    state, about = {}, {}
    for key, (down, up) in pairs.items():
        stem = _named(model, format, *key)
        state |= {stem + suffix: value.contiguous() for suffix, value in zip(SUFFIXES[format], (down, up), strict=True)}
        if alpha is not None and format == "peft":
            about |= {f"{key[0]}.r": len(down), f"{key[0]}.lora_alpha": alpha}
        elif alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    for part in {part for part, _ in pairs} if about else ():
        about[f"{part}.target_modules"] = [module for own, module in pairs if own == part]
    metadata = {"lora_adapter_metadata": json.dumps(about)} if about else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, {"format": "pt", **metadata})
    return file


def _named(model: Path, format: Format, part: str, module: str) -> str:
    if format == "old":
        return f"{part}." + re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1_lora", module)
    if format == "peft":
        return f"{part}.{module}"
    if part in TEXT:
        number = str(1 + TEXT.index(part)) if (model / TEXT[1]).is_dir() else ""
        return f"lora_te{number}_{module.replace('.', '_')}"
    if format == "sgm":
        module = _authors(model / part)[f"{module}.weight"].removesuffix(".weight")
    return f"lora_unet_{module.replace('.', '_')}"


@cache
def _authors(unet: Path) -> dict[str, str]:
    """The authors' names of a U-Net's tensors."""
    own = originals.read(unet)
    return dict(zip(own, originals.unet(own), strict=True))


@torch.no_grad()
def merged(pipeline: Any, adapters: Iterable[tuple[Pairs, float | None, float]]) -> Any:
    """The pipeline with pairs, of these alphas and weights, added to copies of its weights."""
    parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
    for pairs, alpha, weight in adapters:
        for (part, module), (down, up) in pairs.items():
            own = dict(parts[part].named_parameters())
            bare = module.removeprefix("text_model.")
            target = own.get(f"{module}.weight", own.get(f"{bare}.weight"))
            assert target is not None, module
            scale = weight * (1.0 if alpha is None else alpha / len(down))
            added = scale * up.flatten(1).double() @ down.flatten(1).double()
            target.copy_((target.double() + added.view_as(target)).float())
    changed = type(pipeline)(**parts)
    changed.set_progress_bar_config(disable=True)
    return changed
