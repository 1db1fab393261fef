"""Bins: a DiT in diffusers' layout whose weights are torch `.bin` files, offline, to a folder that the server loads.

Knows nothing of the command line, nor of how a folder comes to stand as a whole (converting.py). The Hub repositories
facebook/DiT-XL-2-256 and -512 are such folders: they hold no safetensors. The arithmetic that the card asks for is the
authors' own, as for their `.pt`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.cards.files import read_json
from app.cards.folder import Part
from app.checkpoints.convert import CLASS, Conversion, check_written, write_card, write_index, write_weights
from app.checkpoints.parts import part_states
from app.checkpoints.tensors import State
from app.checkpoints.torchzip import read_torch_zip
from app.checkpoints.vaes import open_vae
from app.errors import CheckpointError
from app.families.dit import dit_keys

BIN = "diffusion_pytorch_model.bin"
_COUNTS = ("num_embeds_ada_norm", "in_channels", "out_channels", "num_layers", "sample_size", "patch_size")


def write_folder(wanted: Conversion, folder: Path, model_id: str, tell: Callable[[str], None]) -> None:
    """Write what `convert_dit` writes of a `.pt`, of the folder `wanted.file`; its own VAE if none is given.

    Raises CheckpointError: configs and tensors that do not make a DiT and a VAE.
    """
    config = _config(wanted.file / "transformer")
    network = _part(tell, folder, Part("transformer", CLASS, wanted.file / "transformer"), config)
    try:
        network = dit_keys(network, dict.fromkeys(network))
    except ValueError as error:
        raise CheckpointError(f"{wanted.file / 'transformer'}: {error}") from error
    vae, vae_config = open_vae(wanted.vae or wanted.file / "vae")
    pixels = _part(tell, folder, vae, vae_config)
    write_index(wanted, folder, config)
    scale = 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1)
    write_card(wanted, folder, model_id, config, scale, _parameters(network, config))
    tell("writing the network and the VAE")
    write_weights(folder / "transformer", network, wanted.dtype)
    write_weights(folder / "vae", pixels, None)


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    for name in _COUNTS:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {config.get(name)!r}, not a number over 0")
    return config


def _part(tell: Callable[[str], None], folder: Path, part: Part, config: dict[str, Any]) -> State:
    """The tensors of one part, after its config is written and its network has taken their names and shapes."""
    torch_zip = part.file is None and (part.folder / BIN).is_file()
    file = part.folder / BIN if torch_zip else part.weights
    tell(f"reading {file}")
    shards = [read_torch_zip(file)] if torch_zip else part_states(part)
    state = {key: value for shard in shards for key, value in shard.items()}
    outline = {key: value.to("meta") for key, value in state.items()}
    check_written(folder / part.name, part.class_name, config, outline, file)
    return state


def _parameters(state: State, config: dict[str, Any]) -> int:
    """As the authors count them: one embedder for all blocks, and the fixed table of positions."""
    copies = {key for key in state if ".norm1.emb." in key and not key.startswith("transformer_blocks.0.")}
    side: int = config["sample_size"] // config["patch_size"]
    positions = side**2 * state["pos_embed.proj.weight"].shape[0]
    return positions + sum(value.numel() for key, value in state.items() if key not in copies)
