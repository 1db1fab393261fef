"""What a load takes of memory, measured in a process of its own: `python -m tests.parts.measured FOLDER WAY...`.

One network's folder of bfloat16 is loaded onto the CPU. The measure is the kernel's VmHWM,
which counts anonymous memory and resident pages of files alike. The load "held" holds all shards until the network has
its weights, which is what must not happen.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.cards.folder import Part
from app.checkpoints.parts import part_outline, part_states
from app.families.components import blank_network, fill_network
from tests.parts.originals import write_sparse

CLASS = "SD3Transformer2DModel"
WIDTH = 1536


def write_network(folder: Path, blocks: int, shards: int) -> None:
    """An SD3 of SD3-medium's width in bfloat16, all zeros: files with holes, that take no disk and no time."""
    from diffusers import SD3Transformer2DModel

    config = {
        "num_layers": blocks,
        "num_attention_heads": WIDTH // 64,
        "attention_head_dim": 64,
        "caption_projection_dim": WIDTH,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 8,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        outline: dict[str, Any] = dict(SD3Transformer2DModel(**config).state_dict())
    size, most = 0, sum(value.numel() for value in outline.values()) / shards
    placed: dict[str, str] = {}
    for key, value in outline.items():
        placed[key] = f"diffusion_pytorch_model-{int(size / most):05}.safetensors"
        size += value.numel()
    for name in set(placed.values()):
        write_sparse({key: outline[key] for key, file in placed.items() if file == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def measure(folder: Path, dtype: torch.dtype, held: bool = False) -> dict[str, int]:
    """Bytes: of the model, of the largest shard, and what the load took above the model at its highest."""
    part, cpu = Part("transformer", CLASS, folder), torch.device("cpu")
    network = blank_network(CLASS, folder, part_outline(part))
    states = list(part_states(part)) if held else part_states(part)
    model = sum(value.numel() * dtype.itemsize for value in network.state_dict().values())
    taken = peak(lambda: fill_network(network, folder, states, cpu, dtype))
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"model": model, "shard": shard, "above": taken - model}


def peak(call: Callable[[], Any]) -> int:
    """Bytes of memory that this process takes while it does this, at the highest, above those that it had."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest is from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


WAYS = {"bfloat16": (torch.bfloat16, False), "float32": (torch.float32, False), "held": (torch.bfloat16, True)}


if __name__ == "__main__":
    print(json.dumps({way: measure(Path(sys.argv[1]), *WAYS[way]) for way in sys.argv[2:]}))
