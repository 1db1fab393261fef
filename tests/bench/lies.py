"""How fast a checkpoint that lies is refused, from the wish to load it to the reason: `python -m tests.bench.lies`.

Copies of a real checkpoint, each with one lie, in one pool; the bar is 50 ms each. Ends in one JSON line.
"""

from __future__ import annotations

import json
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from app.cards.cards import read_card, read_cards
from app.pool.pool import Pool

REAL = Path("models/emoji-mmdit")
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
ROUNDS = 5


def rewrite(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Another header before the same data."""
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    edit(header)
    fresh = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(fresh)) + fresh + whole[8 + length :])


def many_tensors(folder: Path) -> None:
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(b'"%d":%b' % (number, entry) for number in range(250_000)) + b"}"
    (folder / NETWORK).write_bytes(struct.pack("<Q", len(header)) + header)


def index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "model_index.json").read_text())
    edit(content)
    (folder / "model_index.json").write_text(json.dumps(content))


def shards(folder: Path, name: str) -> None:
    listed = {"weight_map": {"pos_embed.proj.weight": name}}
    (folder / f"{NETWORK}.index.json").write_text(json.dumps(listed))


def rename(header: dict[str, Any]) -> None:
    header["another"] = header.pop(next(key for key in header if key != "__metadata__"))


def reshape(header: dict[str, Any]) -> None:
    shape = header["pos_embed.proj.weight"]["shape"]
    shape[0], shape[1] = shape[1], shape[0]


def cut(folder: Path) -> None:
    file = folder / NETWORK
    file.write_bytes(file.read_bytes()[:-1])


def pickled(folder: Path) -> None:
    (folder / NETWORK).rename(folder / "transformer" / "diffusion_pytorch_model.bin")


LIES: dict[str, Callable[[Path], object]] = {
    "one byte short": cut,
    "250,000 tensors": many_tensors,
    "another key": lambda folder: rewrite(folder / NETWORK, rename),
    "another shape": lambda folder: rewrite(folder / NETWORK, reshape),
    "only a pickle": pickled,
    "a shard that is missing": lambda folder: shards(folder, "model-1.safetensors"),
    "a shard elsewhere": lambda folder: shards(folder, "../../etc/passwd"),
    "another class": lambda folder: index(folder, lambda found: found.update(transformer=["os", "system"])),
    "a part elsewhere": lambda folder: index(folder, lambda found: found.update({"../vae": ["diffusers", "VAE"]})),
    "a config of nonsense": lambda folder: (folder / "transformer" / "config.json").write_text('{"num_layers": 1e9}'),
}


def refusal(pool: Pool, model: str) -> tuple[float, str]:
    """Milliseconds from the wish to the failure, and its reason."""
    start = time.perf_counter()
    pool.want(model)
    while (error := pool.failure(model)) is None:
        assert not pool.resident(model, "denoise"), f"{model} was loaded"
        time.sleep(0.0002)
    return 1e3 * (time.perf_counter() - start), error.message


def main() -> None:
    found: dict[str, list[float]] = {lie: [] for lie in LIES}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        cards = {REAL.name: read_cards(REAL.parent)[REAL.name]}
        for number, (lie, tell) in enumerate(LIES.items()):
            folder = Path(temporary) / str(number)
            shutil.copytree(REAL, folder)
            tell(folder)
            cards[lie] = read_card(folder / "card.toml").model_copy(update={"id": lie, "aliases": ()})
        for _ in range(ROUNDS):
            pool = Pool(cards, "cpu", torch.float32)
            pool.want(REAL.name)
            while not pool.resident(REAL.name, "denoise"):
                time.sleep(0.01)
            for lie in LIES:
                seconds, reasons[lie] = refusal(pool, lie)
                found[lie].append(seconds)
            assert pool.resident(REAL.name, "decode")
            pool.close()
    medians = {lie: round(statistics.median(values), 1) for lie, values in found.items()}
    for lie, value in medians.items():
        print(f"{lie:25} {value:6.1f} ms   {reasons[lie].replace(temporary, '')[:90]}")
    print(json.dumps({"bench": "lies", "date": str(date.today()), "worst_ms": max(medians.values()), **medians}))


if __name__ == "__main__":
    main()
