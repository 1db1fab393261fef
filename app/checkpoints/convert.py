"""Converting: a DiT's `.pt` in its authors' names, and a VAE, to a whole folder of a card, offline.

Knows nothing of the command line: it is told what to write, and tells what it does in lines.

What stands in the tensors is read from them (depth, width, patch, size, classes); the number of heads does not, and is
that of facebookresearch/DiT models.py for the width, unless given. The arithmetic that the card asks for is that of
the authors' sample.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from app.cards.card import Card, read_card
from app.cards.files import read_json, to_toml
from app.cards.noise import FILE, schedule_of
from app.checkpoints.parts import part_outline, part_states
from app.checkpoints.tensors import State
from app.checkpoints.torchzip import read_torch_zip
from app.checkpoints.vaes import VAE, open_vae
from app.checkpoints.whole import whole
from app.errors import CheckpointError
from app.families.components import blank_network
from app.families.originals import from_original

SHARD = 5 * 10**9
"""The most bytes of a file of weights that is written."""

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""By width: DiT-S, B, L and XL."""

_SHAPES = {
    "x_embedder.proj.weight": ("width", "channels", "patch", "patch"),
    "y_embedder.embedding_table.weight": ("classes + 1", "width"),
    "pos_embed": ("1", "places", "width"),
    "final_layer.linear.weight": ("patch * patch * channels", "width"),
}
"""The tensors that say how large a DiT is."""

CLASS = "DiTTransformer2DModel"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_CARD = """\
id = "{id}"
family = "dit"
description = "DiT with {classes} classes at {pixels} x {pixels} px, from {source}"
source = {{ path = "." }}
schedule = {schedule}
defaults = {{ sampler = "ddpm", num_inference_steps = 250, guidance_scale = 4.0, size = "{pixels}x{pixels}" }}
limits = {{ num_inference_steps = 1000, sizes = {{ min = {pixels}, max = {pixels}, multiple = {multiple}, \
square = true }} }}
classes = {classes}
# The authors' own arithmetic, from which diffusers' pipeline differs.
guided_channels = 3
time_freq_shift = 0
norm_eps = 1e-6
parameters = {parameters}
"""
_SCHEDULE = {"kind": "diffusion", "betas": "linear", "spacing": "respaced"}
_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert to what. vae: a folder in diffusers' layout, or a safetensors file in the authors'.

    dtype: of the network's weights; None for the file's own. heads: None for those of the width. labels: names of
    classes, used if they are as many as the network's. replace: the folder may be a card without weights, whose facts
    are kept.
    """

    file: Path
    folder: Path
    vae: Path | None
    dtype: torch.dtype | None = None
    heads: int | None = None
    labels: tuple[str, ...] = ()
    replace: bool = False


def convert_dit(wanted: Conversion, tell: Callable[[str], None], write: Callable[..., None] | None = None) -> None:
    """Write the folder whole or not at all, by `write` or as a .pt's. Raises CheckpointError: it exists; bad files."""
    folder = wanted.folder.absolute()
    card = _card_without_weights(folder) if wanted.replace else None
    if folder.exists() and card is None:
        hint = " and holds no card without weights" if wanted.replace else ": name a folder that does not"
        raise CheckpointError(f"{folder} exists{hint}")
    if not _ID.fullmatch(folder.name):
        raise CheckpointError(f'{folder}: "{folder.name}" cannot be the id of a model: letters, digits, ".", "_", "-"')
    with whole(folder) as unfinished:
        (write or _write)(wanted, unfinished, folder.name, tell)
        if card is not None:
            _keep_facts(card, unfinished / "card.toml")
    tell(f"wrote {folder}")


def _card_without_weights(folder: Path) -> Card | None:
    """The card of a folder that holds its facts alone, as the shipped ones do."""
    bare = (folder / "card.toml").is_file() and not any(folder.rglob("*.safetensors"))
    return read_card(folder / "card.toml") if bare else None


def _keep_facts(before: Card, file: Path) -> None:
    """The facts of the card that is replaced, but for where its files are. Raises CheckpointError: other networks'."""
    fresh = read_card(file)
    if (before.family, before.limits.sizes.max) != (fresh.family, fresh.limits.sizes.max):
        pixels = fresh.limits.sizes.max
        raise CheckpointError(
            f"{before.folder}: its card is for another network than these files, a DiT of {pixels} px"
        )
    text = (before.folder / "card.toml").read_text(encoding="utf-8")
    source = re.compile(r"^source = .*$", re.MULTILINE)
    file.write_text(source.sub('source = { path = "." }', text), encoding="utf-8")
    read_card(file)


def _write(wanted: Conversion, folder: Path, model_id: str, tell: Callable[[str], None]) -> None:
    tell(f"reading {wanted.file}")
    theirs = read_torch_zip(wanted.file)
    try:
        state = from_original(CLASS, theirs)
        config = dit_config(theirs, wanted.heads)
    except ValueError as error:
        raise CheckpointError(f"{wanted.file}: {error}") from error
    told = "{num_layers} blocks, {num_attention_heads} heads of {attention_head_dim}, patch {patch_size}"
    tell(f"a DiT: {told.format(**config)}, {config['num_embeds_ada_norm']} classes")
    check_written(folder / "transformer", CLASS, config, {k: v.to("meta") for k, v in state.items()}, wanted.file)
    vae, vae_config = open_vae(wanted.vae)
    check_written(folder / "vae", VAE, vae_config, part_outline(vae), vae.weights)
    write_index(wanted, folder, config)
    scale = 2 ** (len(vae_config["block_out_channels"]) - 1)
    write_card(wanted, folder, model_id, config, scale, sum(value.numel() for value in theirs.values()))
    tell("writing the network and the VAE")
    write_weights(folder / "transformer", state, wanted.dtype)
    write_weights(folder / "vae", {key: value for shard in part_states(vae) for key, value in shard.items()}, None)


def dit_config(theirs: State, heads: int | None = None) -> dict[str, Any]:
    """diffusers' config of a DiT by its authors' names, which `from_original` has read. Raises ValueError."""
    for key, sides in _SHAPES.items():
        if key not in theirs:
            raise ValueError(f"missing weights: {key}")
        shape = list(theirs[key].shape)
        if len(shape) != len(sides) or not theirs[key].numel() or (shape[-1] != shape[-2] and sides[-1] == "patch"):
            raise ValueError(f"{key} has shape {shape}, not [{', '.join(sides)}]")
    patches, table, places, last = (theirs[key] for key in _SHAPES)
    if table.shape[0] < 2:
        raise ValueError("y_embedder.embedding_table.weight holds no class beside the null class")
    width, channels, patch, _ = patches.shape
    heads = heads or HEADS.get(width)
    if heads is None or width % heads:
        raise ValueError(f"a width of {width} is none of the authors' sizes: say how many --heads it has")
    return {
        "_class_name": CLASS,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": last.shape[0] // patch**2,
        "num_layers": len({key.split(".")[1] for key in theirs if key.startswith("blocks.")}),
        "sample_size": isqrt(places.shape[1]) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": table.shape[0] - 1,
    }


def write_weights(folder: Path, state: State, dtype: torch.dtype | None) -> None:
    """The tensors as safetensors in `folder`, in `dtype` or as they are, in as many files as their bytes ask for."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, value in state.items():
        more = value.numel() * (dtype or value.dtype).itemsize
        if shards[-1] and size + more > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += more
    stem = "diffusion_pytorch_model"
    several = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = several if len(shards) > 1 else [f"{stem}.safetensors"]
    for name, keys in zip(names, shards, strict=True):
        # A copy of each, also where two names have one tensor: the format has no second names.
        own = {key: state[key].to(dtype or state[key].dtype, copy=True).contiguous() for key in keys}
        save_file(own, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        placed = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": placed})


def check_written(folder: Path, class_name: str, config: dict[str, Any], outline: State, file: Path) -> None:
    """Write the config, and see that the network of it takes these tensors, before any of them is written."""
    folder.mkdir()
    _write_json(folder / "config.json", config)
    blank_network(class_name, folder, outline, file)


def write_index(wanted: Conversion, folder: Path, config: dict[str, Any]) -> None:
    index: dict[str, Any] = {"_class_name": "DiTPipeline"}
    if len(wanted.labels) == config["num_embeds_ada_norm"]:
        index["id2label"] = {str(number): label for number, label in enumerate(wanted.labels)}
    parts = {"scheduler": "DDIMScheduler", "transformer": CLASS, "vae": VAE}
    _write_json(folder / "model_index.json", {**index, **{part: ["diffusers", kind] for part, kind in parts.items()}})
    (folder / "scheduler").mkdir()
    theirs = wanted.file / FILE
    _write_json(folder / FILE, read_json(theirs) if theirs.is_file() else _SCHEDULER)


def write_card(
    wanted: Conversion, folder: Path, model_id: str, config: dict[str, Any], scale: int, parameters: int
) -> None:
    pixels = config["sample_size"] * scale
    learned = config["out_channels"] == 2 * config["in_channels"]
    schedule = {**_SCHEDULE, "variance": "learned_range" if learned else "fixed_large"}
    card = _CARD.format(
        id=model_id,
        classes=config["num_embeds_ada_norm"],
        pixels=pixels,
        source=json.dumps(wanted.file.name)[1:-1],
        schedule=to_toml(schedule_of(wanted.file, schedule)),
        multiple=pixels,
        parameters=parameters,
    )
    (folder / "card.toml").write_text(card, encoding="utf-8")


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
