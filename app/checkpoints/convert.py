"""Convert a DiT's torch files and a VAE to a folder that the server loads: a card, configs and safetensors.

The source is a `.pt` in the authors' names, or a folder in diffusers' layout with `.bin` files, as the Hub repositories
facebook/DiT-XL-2-256 and -512 are. The tensors of a `.pt` show depth, width, patch, size and classes; the heads are
those of facebookresearch/DiT models.py for the width. The card asks for the arithmetic of the authors' sample.py.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.cards.card import ID, Card
from app.cards.cards import read_card
from app.cards.files import BIN, INDEX, explained, read_json, write_json, write_toml
from app.cards.folder import FILE, Part, schedule_of
from app.checkpoints.parts import part_outline, part_states
from app.checkpoints.tensors import State, read_torch_zip, write_shards
from app.errors import CheckpointError
from app.families.authors import from_original
from app.families.components import blank_network, tied

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

_COUNTS = ("num_embeds_ada_norm", "in_channels", "out_channels", "num_layers", "sample_size", "patch_size")
"""Keys of a DiT's config.json that say how large it is."""

CLASS, VAE = "DiTTransformer2DModel", "AutoencoderKL"

_SCHEDULE = {"kind": "diffusion", "betas": "linear", "spacing": "respaced"}
"""The authors' schedule as a card has it, and as diffusers does."""

_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


Tell = Callable[[str], None]
Network = tuple[State, dict[str, Any], int]
"""The tensors of a DiT by diffusers' names, their config and the number of parameters."""


def convert_dit(
    file: Path,
    folder: Path,
    vae: Path | None,
    tell: Tell,
    *,
    dtype: torch.dtype | None = None,
    heads: int | None = None,
    labels: tuple[str, ...] = (),
    replace: bool = False,
) -> None:
    """Write the folder whole or not at all, and tell what is done, a line each.

    file: a .pt, or a folder of .bin files. vae: a folder in diffusers' layout, or a safetensors file in the authors';
    None for the folder's own. dtype: of the network's weights; None for the file's own. heads: None for the width's.
    labels: of classes, used if the network has as many. replace: `folder` may be a card without weights, which is kept.

    Raises CheckpointError: the folder exists, its name is no id, or the files do not make a DiT and a VAE.
    """
    folder = folder.absolute()
    card = _replaced(folder, replace)
    with _whole(folder) as unfinished:
        if file.is_dir():
            network, config, parameters = _network_of_bins(file, unfinished, tell)
        else:
            network, config, parameters = _network_of_pt(file, unfinished, heads, tell)
        pixels, vae_config = _read_vae(file, vae, unfinished, tell)
        _write_index(file, labels, unfinished, config)
        made = _card_of(folder.name, file, config, vae_config)
        write_toml(unfinished / "card.toml", {**made, "parameters": parameters})
        if card is not None:
            _keep_facts(card, unfinished / "card.toml")
        tell("writing the network and the VAE")
        _write_weights(unfinished / "transformer", network, dtype)
        _write_weights(unfinished / "vae", pixels, None)
    tell(f"wrote {folder}")


def _replaced(folder: Path, replace: bool) -> Card | None:
    """The card in the folder, if it may be replaced. Raises CheckpointError: it may not, or its name is no id."""
    # A folder that has the facts alone, as the shipped cards' do.
    bare = replace and (folder / "card.toml").is_file() and not any(folder.rglob("*.safetensors"))
    if folder.exists() and not bare:
        hint = " and has no card without weights" if replace else ": name a folder that does not"
        raise CheckpointError(f"{folder} exists{hint}")
    if not re.fullmatch(ID, folder.name):
        raise CheckpointError(f'{folder}: "{folder.name}" cannot be the id of a model: letters, digits, ".", "_", "-"')
    return read_card(folder / "card.toml") if bare else None


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place at the end, and nothing is left of it on an error.

    What was there before is gone only when the new one is there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        unfinished, before = Path(place, "new"), Path(place, "before")
        unfinished.mkdir()
        yield unfinished
        for path in (unfinished, *unfinished.rglob("*")):  # of which two libraries would let only the owner read some
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            os.rename(folder, before)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if before.exists():
                os.rename(before, folder)
            raise


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


def _card_of(model: str, file: Path, config: dict[str, Any], vae: dict[str, Any]) -> dict[str, Any]:
    """The card of a network and an autoencoder of these configs, with the authors' own arithmetic."""
    classes, halvings = config["num_embeds_ada_norm"], len(vae.get("block_out_channels", (64,))) - 1
    pixels = config["sample_size"] * 2**halvings
    learned = config["out_channels"] == 2 * config["in_channels"]
    schedule = {**_SCHEDULE, "variance": "learned_range" if learned else "fixed_large"}
    size, sizes = f"{pixels}x{pixels}", {"min": pixels, "max": pixels, "multiple": pixels, "square": True}
    return {
        "id": model,
        "family": "dit",
        "description": f"DiT with {classes} classes at {pixels} x {pixels} px, from {file.name}",
        "source": {"path": "."},
        "schedule": schedule_of(file, schedule),
        "defaults": {"sampler": "ddpm", "num_inference_steps": 250, "guidance_scale": 4.0, "size": size},
        "limits": {"num_inference_steps": 1000, "sizes": sizes},
        "classes": classes,
        "guided_channels": 3,
        "time_freq_shift": 0,
        "norm_eps": 1e-6,
    }


def _network_of_pt(file: Path, folder: Path, heads: int | None, tell: Tell) -> Network:
    """The network of an authors' file; its config is written. Raises CheckpointError."""
    tell(f"reading {file}")
    theirs = read_torch_zip(file)
    with explained(file, ValueError):
        state = from_original(CLASS, theirs)
        config = dit_config(theirs, heads)
    shape = "{num_layers} blocks, {num_attention_heads} heads of {attention_head_dim}, patch {patch_size}"
    tell(f"a DiT: {shape.format(**config)}, {config['num_embeds_ada_norm']} classes")
    _check_fit(folder / "transformer", CLASS, config, state, file)
    return state, config, sum(value.numel() for value in theirs.values())


def _network_of_bins(source: Path, folder: Path, tell: Tell) -> Network:
    """As `_network_of_pt`, of a folder. Raises CheckpointError too where blocks have embedders that differ."""
    place = source / "transformer"
    config = read_json(place / "config.json")
    for name in _COUNTS:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise CheckpointError(f"{place / 'config.json'}: {name} is {config.get(name)!r}, not a number over 0")
    state, file = _read_bins(Part("transformer", CLASS, place), tell)
    network = _check_fit(folder / "transformer", CLASS, config, state, file)
    with explained(place, ValueError):
        state = tied(state, network.state_dict(keep_vars=True))
    # Counted as the authors do: one embedder for all blocks, and the fixed table of positions.
    copies = {key for key in state if ".norm1.emb." in key and not key.startswith("transformer_blocks.0.")}
    positions = (config["sample_size"] // config["patch_size"]) ** 2 * state["pos_embed.proj.weight"].shape[0]
    return state, config, positions + sum(value.numel() for key, value in state.items() if key not in copies)


def _read_vae(source: Path, vae: Path | None, folder: Path, tell: Tell) -> tuple[State, dict[str, Any]]:
    """The tensors of the VAE and its config, which is written. Raises CheckpointError."""
    place = vae or (source / "vae" if source.is_dir() else None)
    if place is None:
        raise CheckpointError("a .pt has no VAE: give one with --vae")
    part = Part("vae", VAE, place) if place.is_dir() else Part("vae", VAE, place.parent, place)
    config = vae_config_of(part_outline(part)) if part.file else read_json(place / "config.json")
    state, file = _read_bins(part, tell)
    _check_fit(folder / "vae", VAE, config, state, file)
    return state, config


def _read_bins(part: Part, tell: Tell) -> tuple[State, Path]:
    """The tensors of a part in a .bin file or in safetensors, and what to name in an error."""
    file = part.folder / BIN
    if part.file is None and file.is_file():
        tell(f"reading {file}")
        return read_torch_zip(file), file
    tell(f"reading {part.weights}")
    return {key: value for shard in part_states(part) for key, value in shard.items()}, part.weights


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
        raise ValueError("y_embedder.embedding_table.weight has no class beside the null class")
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


def vae_config_of(state: State) -> dict[str, Any]:
    """diffusers' config of an autoencoder by diffusers' names, with the scale of the first latent diffusion models."""
    channels = [
        state[key].shape[0] for i in range(9) if (key := f"encoder.down_blocks.{i}.resnets.0.conv1.weight") in state
    ]
    latent, first = state.get("decoder.conv_in.weight"), "encoder.down_blocks.0.resnets."
    return {
        "_class_name": VAE,
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "latent_channels": 4 if latent is None else latent.shape[1],
        "layers_per_block": len({key.split(".")[4] for key in state if key.startswith(first)}),
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": 0.18215,
    }


def _check_fit(folder: Path, class_name: str, config: dict[str, Any], state: State, file: Path) -> nn.Module:
    """Write the config; return its network, without weights, once it is known to take these tensors."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    return blank_network(class_name, folder, {key: value.to("meta") for key, value in state.items()}, file)


def _write_index(file: Path, labels: tuple[str, ...], folder: Path, config: dict[str, Any]) -> None:
    """Write model_index.json, and the folder's own scheduler_config.json or the authors' schedule as one."""
    index: dict[str, Any] = {"_class_name": "DiTPipeline"}
    if len(labels) == config["num_embeds_ada_norm"]:
        index["id2label"] = {str(number): label for number, label in enumerate(labels)}
    parts = {"scheduler": "DDIMScheduler", "transformer": CLASS, "vae": VAE}
    write_json(folder / INDEX, {**index, **{part: ["diffusers", kind] for part, kind in parts.items()}})
    (folder / "scheduler").mkdir()
    theirs = file / FILE
    write_json(folder / FILE, read_json(theirs) if theirs.is_file() else _SCHEDULER)


def _write_weights(folder: Path, state: State, dtype: torch.dtype | None) -> None:
    """The tensors as safetensors in `folder`, in `dtype` or as they are, in as many files as their bytes ask for."""
    outline = {key: torch.empty(value.shape, dtype=dtype or value.dtype, device="meta") for key, value in state.items()}
    # A copy of each, also where two names have one tensor: the format has no second names.
    write_shards(folder, outline, SHARD, lambda key: state[key].to(outline[key].dtype, copy=True).contiguous())
