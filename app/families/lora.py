"""LoRA: the tensors of an adapter's file, and the modules of a model's networks that they change.

A pair is `down` [rank, inputs], with the kernel's sides for a convolution, and `up` [outputs, rank]: a module's weight
grows by up @ down. Files name modules as diffusers does, or as the authors of the network do (`authors.toml`),
kohya-ss/sd-scripts with underscores for dots.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from torch import nn

from app.families.authors import Tensors, modules_of, swapped

Pair = tuple[torch.Tensor, torch.Tensor]
Layer = nn.Linear | nn.Conv2d

RANK, ALPHA, LOST = 1024, 1e6, 1000
"""The most of a pair's rank, of an alpha, and of tensors without a place."""

_TENSOR = re.compile(
    r"(.+?)(?:\.lora_(A|B)(?:\.[^.]+)?\.weight|(?:\.lora(?:_linear_layer)?)?\.(?:lora_)?(down|up)\.weight|\.(alpha))"
)
_HALVES = {"A": "down", "B": "up"}
_PARTS = {
    "text_encoder": re.compile(r"lora_te1?_|text_encoder\.|text_encoders\.clip_l\.transformer\."),
    "text_encoder_2": re.compile(r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.transformer\."),
    "T5": re.compile(r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.transformer\."),
    "": re.compile(r"lora_unet_|lora_transformer_|lycoris_|(?:(?:transformer|unet|diffusion_model|model)\.)*"),
}
"""How the names of a part's modules begin. A T5 is the last text encoder of its model, and "" its network."""

_OTHERS = {
    "one with names of over 256 characters": r"^.{257}",
    "a DoRA, which scales whole weights too": r"dora_scale|magnitude_vector",
    "a LyCORIS of another kind than LoRA": r"\.(?:lokr|hada)_|\.lora_mid\.",
    "an OFT, which turns weights": r"[._]b?oft_",
    "a control LoRA of BFL, which replaces norms too": r"(?:query|key)_norm\.scale$",
    "one with whole weights beside the low ranks": r"\.diff(?:_b)?$|\.set_weight$|\.[wb]_norm$",
    "one with biases of its own": r"\.lora_(?:A|B|up|down)(?:\.[^.\n]+)?\.bias$",
    "a LoRA of SDXL": r"_blocks?[._]\d.*transformer_blocks[._][1-9]",
    "a LoRA of Stable Diffusion 1 or 2": r"(?:down|up|input|output)_blocks[._]\d|(?:mid|middle)_block[._]",
    "a LoRA of FLUX.2": r"\.to_qkv_mlp_proj|double_stream_modulation",
    "a LoRA of FLUX.1": r"(?:double|single)_blocks[._]\d|single_transformer_blocks[._]\d",
    "a LoRA of Stable Diffusion 3": r"joint_blocks[._]\d",
    "a LoRA of Qwen-Image": r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)",
    "a LoRA of Wan": r"blocks[._]\d+[._](?:self|cross)_attn[._]",
}
"""What a file with such names is, in place of a LoRA of this model; the rest of it would be another adapter.

A pattern that fits names of the network's own modules refuses nothing.
"""
_OWN = {"SD3Transformer2DModel": "a LoRA of Stable Diffusion 3"}
"""The kind of file that is right for a network with other names than its authors' files have."""


@dataclass(frozen=True, slots=True)
class Matched:
    """Pairs by part and module, in diffusers' names; `up` is float32, with alpha / rank in it.

    The modules of a fused one share their `down`, the same object. unmatched: keys of the file without a place.
    """

    pairs: dict[tuple[str, str], Pair]
    unmatched: tuple[str, ...]


def match(state: Tensors, networks: Mapping[str, nn.Module], metadata: Mapping[str, str] | None = None) -> Matched:
    """The pairs of an adapter's tensors for the networks of a model, by the names of their parts.

    state: all tensors of the file, which are copied; on the meta device for what names and shapes show. metadata: that
    of the file, where diffusers writes alpha. Raises ValueError in words for a user: what the file is if it is no LoRA
    of this model, or what is wrong in it.
    """
    own = next((part for part in networks if not part.startswith("text")), "")
    last = max((part for part in networks if part.startswith("text")), default="")
    _refuse_others("\n".join(state), networks.get(own))
    settings = _settings(metadata or {}, own)
    layers = {
        part: {_flat(name): (name, one) for name, one in network.named_modules() if isinstance(one, Layer)}
        for part, network in networks.items()
    }
    found: dict[tuple[str, tuple[str, ...], bool], dict[str, str]] = {}
    lost: dict[str, str] = {}
    for key in state:
        part, name, half = _read(key, {"T5": last, "": own})
        modules, turned = _place(name, networks[part], layers[part]) if part in networks else ((), False)
        if not modules:
            lost[key] = part
        elif found.setdefault((part, modules, turned), {}).setdefault(half, key) != key:
            raise ValueError(f"{key!r} and {found[part, modules, turned][half]!r} are for the same place")
    pairs: dict[tuple[str, str], Pair] = {}
    for (part, modules, turned), halves in found.items():
        places = dict(layers[part][name] for name in modules)
        try:
            fresh = _pairs({half: state[key] for half, key in halves.items()}, places, turned, settings.get(part, {}))
        except ValueError as error:
            raise ValueError(f"{next(iter(halves.values()))!r} {error}") from error
        for module, pair in zip(places, fresh, strict=True):
            if pairs.setdefault((part, module), pair) is not pair:
                raise ValueError(f"{part}.{module} stands in the file twice")
    beside = set(lost.values()) - {part for part, _ in pairs}
    if not pairs or len(lost) > LOST or own in beside:
        raise ValueError(f"is no LoRA of this model: {len(lost)} tensors have no place, as {min(lost, default='')!r}")
    return Matched(pairs, tuple(lost))


def _refuse_others(keys: str, network: nn.Module | None) -> None:
    """Raise ValueError if the keys, a line each, are those of another kind of file or of another network."""
    names = "\n".join(name for name, _ in network.named_modules()) if network else ""
    for words, pattern in _OTHERS.items():
        own = words == _OWN.get(type(network).__name__) or re.search(pattern, names, re.MULTILINE)
        if not own and (sign := re.search(pattern, keys, re.MULTILINE)):
            raise ValueError(f"is {words}, by its names ({sign[0][:40]!r}): take a plain LoRA of this model")


def _read(key: str, others: Mapping[str, str]) -> tuple[str, str, str]:
    """The part, the name there, and "down", "up" or "alpha"; "" for what is none of these.

    others: the names of the parts that a model has as "T5" and "".
    """
    read = _TENSOR.fullmatch(key)
    if read is None:
        return "", "", ""
    name, half = read[1].replace("base_model.model.", ""), read[2] or read[3] or read[4]
    part, start = next((part, begin[0]) for part, sign in _PARTS.items() if (begin := sign.match(name)))
    return others.get(part, part), name.removeprefix(start), _HALVES.get(half, half)


def _flat(name: str) -> str:
    """A name as sd-scripts writes it. Those of a CLIP's modules begin with `text_model.` or not, by version."""
    return name.replace(".", "_").removeprefix("text_model_")


def _place(name: str, network: nn.Module, layers: Collection[str]) -> tuple[tuple[str, ...], bool]:
    """The modules of a name in a file, flat, and whether their halves are swapped; none where it has no place."""
    if _flat(name) in layers:
        return (_flat(name),), False
    blocks = len(getattr(network, "transformer_blocks", ()))
    modules, turned = modules_of(type(network).__name__, name, blocks)
    flat = tuple(map(_flat, modules))
    return (flat, turned) if all(one in layers for one in flat) else ((), False)


def _pairs(halves: Tensors, places: Mapping[str, Layer], turned: bool, settings: Mapping[str, Any]) -> list[Pair]:
    """The pairs of modules that the file has as one: with the same `down`; or where each `up` is zeros for the ranks of
    the others, with its own (split_qkv of sd-scripts). Raises ValueError, as the end of a sentence about the file."""
    down, up = halves.get("down"), halves.get("up")
    if down is None or up is None:
        raise ValueError("is there without its other half")
    if down.ndim < 2 or down.ndim != up.ndim or (down.shape[0], *[1] * (up.ndim - 2)) != up.shape[1:]:
        raise ValueError(f"and its other half have shapes {list(down.shape)} and {list(up.shape)}, which do not agree")
    rows, rank = [len(one.weight) for one in places.values()], len(down)
    for theirs, ours in ((down.shape[1:], next(iter(places.values())).weight.shape[1:]), (up.shape[:1], (sum(rows),))):
        if theirs != ours:
            wide, own_wide = (" x ".join(map(str, shape)) for shape in (theirs, ours))
            raise ValueError(f"is for a width of {wide}, this network has {own_wide}")
    if not 1 <= rank <= RANK:
        raise ValueError(f"has a rank of {rank}, which is not 1 to {RANK}")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"and its other half hold {down.dtype} and {up.dtype}, not floating point")
    up = (next(iter(swapped(up, {}))) if turned else up).flatten(1).to(torch.float32, copy=True)
    up *= _alpha(halves.get("alpha"), next(iter(places)), rank, settings) / rank
    if not down.is_meta and not isfinite(down.sum(dtype=torch.float32) + up.sum()):  # over 10 times faster than each
        raise ValueError("or its other half holds numbers that are not finite")
    down, ups, own = down.clone(), torch.split(up, rows), rank // len(rows)
    blocks = [one[:, index * own : (index + 1) * own].contiguous() for index, one in enumerate(ups)]
    shared = down.is_meta or own * len(rows) != rank
    if shared or any(one.count_nonzero() != block.count_nonzero() for one, block in zip(ups, blocks, strict=True)):
        return [(down, one) for one in ups]
    return list(zip(torch.split(down, own), blocks, strict=True))


def _alpha(tensor: torch.Tensor | None, module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Of the tensor, where sd-scripts has 0 for the rank; else of peft's settings. Raises ValueError."""
    found = settings.get("lora_alpha", rank)
    for name, value in reversed(settings.get("alpha_pattern", {}).items()):  # the first counts
        found = value if f".{module}".endswith(f".{name}") else found
    if tensor is not None:
        found = None if tensor.numel() != 1 else rank if tensor.is_meta else tensor.item() or rank
    if not isinstance(found, int | float) or not abs(found) < ALPHA:
        raise ValueError(f"has an alpha that is not a number under {ALPHA:.0f}: {found!r:.40}")
    return found * (sqrt(rank) if tensor is None and settings.get("use_rslora") else 1)


def _settings(metadata: Mapping[str, str], own: str) -> dict[str, dict[str, Any]]:
    """peft's settings by part, as diffusers writes them. own: the part of those without one. Raises ValueError."""
    settings: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
            part, _, name = key.rpartition(".")
            settings.setdefault(part or own, {})[name] = dict(value) if name == "alpha_pattern" else value
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("has lora_adapter_metadata that is not peft's settings") from error
    return settings
