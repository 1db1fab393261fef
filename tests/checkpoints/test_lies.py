"""Files in the authors' layouts that lie: one clear line each, before a tensor is read, and little memory and time."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cards.cards import read_cards
from app.cards.folder import Part
from app.errors import CheckpointError
from app.pool import memory
from app.pool.pool import Pool
from tests.checkpoints.test_parts import name_files
from tests.parts import originals
from tests.parts.measured import peak
from tests.parts.tiny import write_sd3
from tests.parts.tiny_parts import Payload
from tests.pool.test_pool import states_until

UNET = "model.diffusion_model."
FUSED = f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cards with one SD3, all weights of which are in one file."""
    folder = tmp_path_factory.mktemp("whole") / "models"
    write_sd3(folder / "sd3", name="own")
    state = originals.sd3_file(folder / "sd3", "text_encoder", "text_encoder_2", "text_encoder_3")
    for file in (folder / "sd3").glob("*/*.safetensors"):
        file.unlink()
    originals.write(state, folder / "sd3" / "sd3.safetensors")
    name_files(folder / "sd3", "sd3", "sd3.safetensors")
    return folder


@pytest.fixture
def models(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(whole, tmp_path / "models")
    return tmp_path / "models"


def weights(models: Path) -> Path:
    return models / "sd3" / "sd3.safetensors"


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def write(file: Path, header: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def edited(edit: Edit) -> Callable[[Path], Any]:
    def spoil(models: Path) -> None:
        header, data = header_of(weights(models))
        edit(header)
        write(weights(models), json.dumps(header).encode(), data)

    return spoil


def renamed(before: str, after: str) -> Callable[[Path], Any]:
    return edited(lambda header: header.update({after: header.pop(before)}))


def twice(models: Path) -> None:
    header, data = header_of(weights(models))
    text = json.dumps(header)
    write(weights(models), f'{text[:-1]}, "{FUSED}": {json.dumps(header[FUSED])}}}'.encode(), data)


def many(models: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    edited(lambda header: header.update({f"{UNET}x.{number}": entry for number in range(21_000)}))(models)


def sparse(header: int) -> Callable[[Path], Any]:
    def spoil(models: Path) -> None:
        with weights(models).open("wb") as stream:
            stream.write(struct.pack("<Q", header))
            stream.truncate(8 + header)

    return spoil


def config(part: str, **fields: Any) -> Callable[[Path], Any]:
    def spoil(models: Path) -> None:
        file = models / "sd3" / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return spoil


def reshape(shape: list[int]) -> Callable[[Path], Any]:
    return edited(lambda header: header[FUSED].update(shape=shape))


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda m: weights(m).write_bytes(weights(m).read_bytes()[:-9]), "not a whole safetensors file"),
    "truncated header": (lambda m: weights(m).write_bytes(weights(m).read_bytes()[:99]), "truncated"),
    "a key twice": (twice, "a key twice"),
    "a huge header": (sparse(2**30), "header of 1073741824 bytes, over"),
    "many tensors": (many, "over 20000 tensors"),
    "no third": (reshape([64, 48]), "qkv.weight has shape [64, 48], which does not split into q, k and v"),
    "another width": (reshape([48, 64]), "attn.to_k.weight has shape [16, 64], not [32, 32]"),
    "its name": (
        renamed(FUSED.replace("0", "1"), f"{UNET}joint_blocks.1.x_block.attn.kqv.weight"),
        "unexpected weights: joint_blocks.1",
    ),
    "left out": (renamed(f"{UNET}x_embedder.proj.bias", "other.bias"), "missing weights: pos_embed.proj.bias"),
    "a block far away": (renamed(FUSED, FUSED.replace(".0.", ".9999.")), "no transformer of class SD3"),
    "a name of a megabyte": (renamed(f"{UNET}pos_embed", UNET + "x" * 2**20), "unexpected weights: xxx"),
    "whole numbers": (edited(lambda h: h[FUSED].update(dtype="I32")), "holds torch.int32, not floating point"),
    "eight bits": (
        edited(lambda h: h[FUSED].update(dtype="F8_E4M3", shape=[384, 32])),
        "number format F8_E4M3 (8-bit floats), which",
    ),
    "a million layers": (config("transformer", num_layers=10**6), "num_layers = 1000000, but the weights hold"),
    "a huge table": (config("transformer", pos_embed_max_size=10**5), "pos_embed"),
    "a pickle": (lambda m: weights(m).write_bytes(pickle.dumps({"a": Payload(m / "ran")})), "sd3.safetensors: "),
    "another's file": (
        lambda m: originals.write({"double_blocks.0.img_attn.qkv.weight": torch.ones(3)}, weights(m)),
        "no transformer of class SD3Transformer2DModel: no part of a known layout is in it",
    ),
    "only a VAE": (
        lambda m: originals.write(
            {k: v for k, v in originals.load_file(weights(m)).items() if k.startswith("first_stage")}, weights(m)
        ),
        "no transformer of class SD3Transformer2DModel: it holds vae (VAE)",
    ),
    "a folder": (lambda m: (weights(m).unlink(), weights(m).mkdir()), "missing, though the card's files"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_in_one_line_before_a_tensor_is_read(
    models: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, told = LIES[lie]
    spoil(models)
    monkeypatch.setattr(memory, "part_states", lambda part: pytest.fail("not a byte of weights"))
    pool = Pool(read_cards(models), "cpu", torch.float32)

    def load() -> None:
        pool.want("sd3")
        states_until(pool, "sd3", "failed")

    taken, error = peak(load), pool.failure("sd3")
    pool.close()
    assert isinstance(error, CheckpointError) and len(error.message) < 1000 and "\n" not in error.message
    assert told in error.message
    assert str(models / "sd3") in error.message, "it names the file"
    assert taken < 60 * 2**20, "bytes; the file of the huge header has a gigabyte"
    assert not (models / "ran").exists()


def test_the_same_file_unspoiled_loads(whole: Path) -> None:
    pool = Pool(read_cards(whole), "cpu", torch.float32)
    pool.want("sd3")
    states_until(pool, "sd3", "ready")
    pool.close()


def test_mutated_headers_are_refused_or_right(whole: Path, tmp_path: Path) -> None:
    """300 files with a few bytes of the header changed: a CheckpointError or an outline, and nothing else."""
    file, chance, refused = tmp_path / "sd3.safetensors", random.Random(5), 0
    raw = weights(whole).read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    folder = whole / "sd3" / "transformer"
    for _ in range(300):
        spoiled = bytearray(raw)
        for _ in range(chance.randint(1, 3)):
            spoiled[chance.randrange(end)] = chance.randrange(256)
        file.write_bytes(spoiled)
        try:
            memory.Component(
                Part("transformer", "SD3Transformer2DModel", folder, file), torch.device("cpu"), torch.float32
            )
        except CheckpointError as error:
            refused += 1
            assert str(file) in error.message and len(error.message) < 1000
    assert 100 < refused <= 300


def test_a_file_of_another_part_may_have_any_number_format(models: Path) -> None:
    """A T5 in eight bits beside the network keeps nobody from the network."""
    key = "text_encoders.t5xxl.transformer.shared.weight"
    edited(
        lambda header: header.update(
            {key: {**header[key], "dtype": "F8_E4M3", "shape": [header[key]["shape"][0] * 4, 48]}}
        )
    )(models)
    part = Part("transformer", "SD3Transformer2DModel", models / "sd3" / "transformer", weights(models))
    assert memory.Component(part, torch.device("cpu"), torch.float32).bytes > 0
    t5 = Part("text_encoder_3", "T5EncoderModel", models / "sd3" / "text_encoder_3", weights(models))
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        memory.Component(t5, torch.device("cpu"), torch.float32)
