"""Tiny LoRA files in the formats of their trainers, and what they add to weights, by code that is not the app's.

A file is for one model folder. Where a format fuses layers, its names and its rows are those of the model's authors:
the elements of a part get numbers, `originals` moves these as it moves tensors, and where they end says where the rows
of a file belong.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app.cards.card import Card
from app.checkpoints.adapters import survey
from tests.parts.originals import State, flux, read, sd3

Format = Literal["peft", "kohya", "xlabs"]
Fault = Literal["", "alpha", "qk", "text"]
"""What a reader of files might get wrong: alpha ignored, queries and keys swapped, text encoders left out."""

NETWORK, CLIP, T5 = "transformer", ("text_encoder", "text_encoder_2"), "text_encoder_3"
SUFFIXES: dict[Format, tuple[str, str]] = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "xlabs": (".down.weight", ".up.weight"),
}
"""Of the two matrices: the one that a layer's input meets, and the one that makes its output."""

LAYER = re.compile(r"attn|\.ff|\.mlp|Attention|DenseReluDense|(norm|norm1|norm1_context)\.linear|proj_(mlp|out)\.")
BLOCKS = re.compile(r"(joint|double|single)_blocks\.")
XLABS = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1"}
XLABS |= {"txt_attn.proj": "proj_lora2", "linear1": "qkv_lora", "linear2": "proj_lora"}


@dataclass(frozen=True)
class Place:
    """Where a pair of matrices adds: the numbers [out, in] of a part's elements, in the order of its file."""

    part: str
    elements: torch.Tensor


def numbered(folder: Path) -> State:
    """The tensors of a part, each element with its number."""
    found, end = {}, 0
    for name, value in sorted(read(folder).items()):
        found[name] = torch.arange(end, end + value.numel()).view(value.shape)
        end += value.numel()
    return found


def places(model: Path, format: Format) -> dict[str, Place]:
    """Every layer that a file of this format can change, by the name that it has there without a suffix."""
    parts = [NETWORK, *(one for one in (*CLIP, T5) if (model / one).is_dir())]
    found: dict[str, Place] = {}
    for part in parts if format != "xlabs" else [NETWORK]:
        own = numbered(model / part)
        for name, elements in (_authors(own) if part == NETWORK and format != "peft" else own).items():
            layer = name.removesuffix(".weight")
            wanted = BLOCKS.match(name) if part == NETWORK and format != "peft" else LAYER.search(name)
            if wanted and elements.ndim == 2 and "relative" not in name:
                found |= _placed(model, part, layer, elements, format)
    return found


def _authors(own: State) -> State:
    return sd3(own) if "pos_embed.pos_embed" in own or "pos_embed.proj.weight" in own else flux(own)


def _placed(model: Path, part: str, layer: str, elements: torch.Tensor, format: Format) -> dict[str, Place]:
    if format == "peft":
        return {f"{part}.{layer}": Place(part, elements)}
    if format == "kohya":
        prefix = "lora_unet" if part == NETWORK else _encoder(model, part)
        return {f"{prefix}_{layer.replace('.', '_')}": Place(part, elements)}
    block, index, rest = layer.split(".", 2)
    if rest not in XLABS:
        return {}
    rows = elements[: 3 * elements.shape[1]] if rest == "linear1" else elements
    return {f"{block}.{index}.processor.{XLABS[rest]}": Place(part, rows)}


def _encoder(model: Path, part: str) -> str:
    """kohya's prefix of a text encoder: FLUX's T5 has the number of SD3's."""
    kind = json.loads((model / part / "config.json").read_text(encoding="utf-8"))["model_type"]
    return "lora_te3" if kind == "t5" else {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]


def write_lora(
    file: Path,
    model: Path,
    format: Format = "peft",
    *,
    only: str = f"^({NETWORK}|lora_unet|double|single)",
    ranks: Sequence[int] = (4, 2),
    alpha: float | None = None,
    size: float = 0.4,
    seed: int = 0,
    sparse: bool = False,
) -> Path:
    """Write a file of drawn numbers for the layers of the model with these names (a regular expression).

    ranks: in turns. alpha: of every layer; peft's files have theirs in the metadata, and XLabs' have none. size: of
    what is added, as a share of a tiny model's weights. sparse: fused queries, keys and values keep their ranks apart.
    """
    dice, state = torch.Generator().manual_seed(seed), {}
    down_suffix, up_suffix = SUFFIXES[format]
    chosen = [(stem, place) for stem, place in sorted(places(model, format).items()) if re.search(only, stem)]
    assert chosen, f"{model} has no layers {only}"
    for number, (stem, place) in enumerate(chosen):
        out, inside = place.elements.shape
        rank = ranks[number % len(ranks)] * (3 if sparse and "qkv" in stem else 1)
        scale = 1.0 if alpha is None else alpha / rank
        state[stem + down_suffix] = torch.randn(rank, inside, generator=dice) * (inside * abs(scale)) ** -0.5
        up = torch.randn(out, rank, generator=dice) * size * (rank * abs(scale)) ** -0.5
        if sparse and "qkv" in stem:
            up = torch.block_diag(*(own[:, : rank // 3] for own in up.chunk(3)))
        state[stem + up_suffix] = up
        if format == "kohya":
            state[stem + ".alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    about = _metadata(chosen, ranks, alpha) if format == "peft" and alpha is not None else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"format": "pt", **about})
    return file


def _metadata(chosen: list[tuple[str, Place]], ranks: Sequence[int], alpha: float) -> dict[str, str]:
    """What diffusers writes of peft's settings: one rank and one alpha for all layers of a part."""
    assert len(ranks) == 1
    facts: dict[str, Any] = {}
    for part in sorted({place.part for _, place in chosen}):
        layers = [stem.removeprefix(f"{part}.") for stem, place in chosen if place.part == part]
        facts |= {f"{part}.r": ranks[0], f"{part}.lora_alpha": alpha, f"{part}.target_modules": layers}
    return {"lora_adapter_metadata": json.dumps(facts)}


@dataclass(frozen=True)
class Pair:
    """The two matrices of a layer, in float64, and the factor of alpha."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def read_pairs(file: Path) -> dict[str, Pair]:
    """By the name without a suffix."""
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    found = {}
    for down_suffix, up_suffix in SUFFIXES.values():
        for name in [name for name in state if name.endswith(down_suffix)]:
            stem = name.removesuffix(down_suffix)
            down, up = state[name].double(), state[stem + up_suffix].double()
            alpha = about.get(f"{stem.partition('.')[0]}.lora_alpha", float(state.get(stem + ".alpha", len(down))))
            found[stem] = Pair(down, up, alpha / len(down))
    return found


def format_of(file: Path) -> Format:
    stem = next(iter(read_pairs(file)))
    return "kohya" if stem.startswith("lora_") else "xlabs" if ".processor." in stem else "peft"


def deltas(model: Path, files: Iterable[tuple[Path, float]], fault: Fault = "") -> Iterator[tuple[str, str, Any]]:
    """What adapters with these weights add: part, name in its file, float64 of that tensor's shape."""
    sums: dict[str, torch.Tensor] = {}
    for file, weight in files:
        where = places(model, format_of(file))
        for stem, pair in read_pairs(file).items():
            place = where[stem]
            if fault == "text" and place.part != NETWORK:
                continue
            if place.part not in sums:
                count = sum(value.numel() for value in read(model / place.part).values())
                sums[place.part] = torch.zeros(count, dtype=torch.float64)
            scale = weight * (1.0 if fault == "alpha" else pair.scale)
            sums[place.part][place.elements.flatten()] += (scale * pair.up @ pair.down).flatten()
    for part, added in sums.items():
        for name, elements in numbered(model / part).items():
            yield part, _swapped(name) if fault == "qk" else name, added[elements]


def _swapped(name: str) -> str:
    """The name of the keys for that of the queries, and the other way round."""
    for q, k in ((".to_q.", ".to_k."), (".add_q_proj.", ".add_k_proj."), (".q_proj.", ".k_proj."), (".q.", ".k.")):
        if q in name or k in name:
            return name.replace(q, k) if q in name else name.replace(k, q)
    return name


@torch.no_grad()
def merged(pipeline: Any, model: Path, files: Sequence[tuple[Path, float]], fault: Fault = "") -> Any:
    """The pipeline of a model folder with the adapters added to copies of its weights."""
    parts = dict(pipeline.components)
    for part, name, added in deltas(model, files, fault):
        if parts[part] is pipeline.components[part]:
            parts[part] = copy.deepcopy(pipeline.components[part])
        own = dict(parts[part].named_parameters())
        # transformers' CLIPTextModel has dropped the prefix that files keep.
        weight = own.get(name) if name in own else own.get(name.removeprefix("text_model."))
        if weight is None:
            assert not added.any(), name
            continue
        weight.copy_((weight.double() + added).float())
    changed = type(pipeline)(**parts)
    changed.set_progress_bar_config(disable=True)
    return changed


def loaded(pipeline: Any, files: Sequence[tuple[Path, float]]) -> Any:
    """A pipeline of its own with the adapters loaded by diffusers, which has no place for those of a T5."""
    parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
    own = type(pipeline)(**parts)
    own.set_progress_bar_config(disable=True)
    for file, _ in files:
        own.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
    own.set_adapters([file.stem for file, _ in files], [weight for _, weight in files])
    return own


def surveyed(folder: Path, cards: Mapping[str, Card]) -> dict[str, Card]:
    """The cards with the adapters of a folder, as the server finds them. Asserts that each fits a card."""
    found = {one.name: one for one in survey(folder, cards)}
    assert all(one.fits for one in found.values()), [one.problem for one in found.values()]
    return {name: card.model_copy(update={"adapters": found}) for name, card in cards.items()}
