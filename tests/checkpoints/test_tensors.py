"""Weights: whole files are read, files that lie are refused by name before they cost memory."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from app.checkpoints import tensors as weights
from app.checkpoints.tensors import read_outline
from app.errors import CheckpointError
from tests.parts.tiny_parts import read_state

Read = Callable[[Path], dict[str, torch.Tensor]]
STATE = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16), "d": torch.tensor(3.5)}


@pytest.fixture(params=[read_state, read_outline], ids=["state", "outline"])
def read(request: pytest.FixtureRequest) -> Read:
    """Both ways to read: what the headers can show is refused before a tensor is read."""
    return cast(Read, request.param)


def write_raw(file: Path, header: bytes, data: bytes = b"") -> Path:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


def write_header(file: Path, header: Any, data: bytes = b"") -> Path:
    return write_raw(file, json.dumps(header).encode(), data)


def entry(start: int, end: int, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write_shards(folder: Path) -> Path:
    """Two shards and the index that names them; returns the index."""
    save_file({"a": STATE["a"]}, folder / "model-1.safetensors")
    save_file({"b.c": STATE["b.c"], "d": STATE["d"]}, folder / "model-2.safetensors")
    files = {"a": "model-1.safetensors", "b.c": "model-2.safetensors", "d": "model-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


def edit_index(index: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_one_file(tmp_path: Path, stem: str) -> None:
    save_file(STATE, tmp_path / f"{stem}.safetensors", metadata={"format": "pt"})
    read = read_state(tmp_path)
    assert read.keys() == STATE.keys() and all(torch.equal(read[key], STATE[key]) for key in STATE)
    assert read["b.c"].dtype == torch.bfloat16


def test_shards_before_a_single_file(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    read = read_state(tmp_path)
    assert read.keys() == STATE.keys() and all(torch.equal(read[key], STATE[key]) for key in STATE)


def test_an_outline_has_the_shapes_and_formats_and_no_data(tmp_path: Path) -> None:
    write_shards(tmp_path)
    outline = read_outline(tmp_path)
    assert {key: (value.shape, value.dtype) for key, value in outline.items()} == {
        key: (value.shape, value.dtype) for key, value in STATE.items()
    }
    assert all(value.is_meta for value in outline.values())


def test_every_truncation(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(STATE, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            read(tmp_path)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="file not fully covered"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(12, 20)}, "invalid offset for tensor `b`"),
        ({"a": entry(0, 8), "b": entry(4, 12), "c": entry(12, 20)}, "invalid offset for tensor `b`"),
        ({"a": entry(0, 8), "b": entry(8, 20)}, "invalid shape"),
        ({"a": entry(0, 20, shape=(5.0,))}, "floating point `5.0`"),
        ({"a": entry(0, 20, shape=(-1, -5))}, "integer `-1`"),
        ({"a": entry(0, 20, shape=(True, 5))}, "boolean `true`"),
        ({"a": entry(0, 20, "F8_E4M3", (20,))}, "F8_E4M3"),
        ({"a": entry(0, 20, "F31", (5,))}, "F31"),
        ({"a": {"dtype": "F32", "shape": [5]}}, "missing field `data_offsets`"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": "0,20"}}, "expected a tuple of size 2"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0]}}, "expected a tuple of size 2"),
        ({"a": 1}, "invalid JSON in header"),
        ([1, 2], "invalid JSON in header"),
    ],
    ids=str,
)
def test_headers_that_lie(read: Read, tmp_path: Path, header: Any, reason: str) -> None:
    file = write_header(tmp_path / "model.safetensors", header, bytes(20))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}.*{reason}"):
        read(tmp_path)


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{" + ONE + b"," + ONE + b"}", "a key twice"),
        (b"[" * 100_000, "invalid JSON in header"),
        (b'{"\xff": 1}', "invalid UTF-8 in header"),
        (b"{", "invalid JSON in header"),
    ],
    ids=["twice", "deep", "utf8", "open"],
)
def test_headers_that_are_no_headers(read: Read, tmp_path: Path, header: bytes, reason: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, bytes(4))
    with pytest.raises(CheckpointError, match=reason):
        read(tmp_path)


def test_giant_headers_are_not_parsed(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Path] = []
    monkeypatch.setattr(weights, "safe_open", lambda file, **_: parsed.append(file))
    file = tmp_path / "model.safetensors"
    many = b'{"data_offsets":[0,0],"dtype":"F32","shape":[0]}'
    write_raw(file, b"{" + b",".join(b'"%d":%b' % (i, many) for i in range(weights.TENSOR_LIMIT + 1)) + b"}")
    with pytest.raises(CheckpointError, match="over 20000 tensors"):
        read(tmp_path)
    write_raw(file, b'{"a":[' + b"{}," * (weights.COMMAS * weights.TENSOR_LIMIT) + b"1,1]}")
    with pytest.raises(CheckpointError, match="over 20000 tensors"):
        read(tmp_path)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", weights.HEADER_LIMIT + 1))
        stream.truncate(weights.HEADER_LIMIT + 9)
    with pytest.raises(CheckpointError, match="a header of 16777217 bytes"):
        read(tmp_path)
    assert not parsed


def test_a_missing_shard(read: Read, tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda files: files.pop("d"), "model-2.safetensors: d is in only one"),
        (lambda files: files.update(e="model-1.safetensors"), "model-1.safetensors: e is in only one"),
        (lambda files: files.update(a="model-2.safetensors"), "model-2.safetensors: a is in only one"),
        (lambda files: files.update(a="../model-1.safetensors"), "is not the name of a safetensors file"),
        (lambda files: files.update(a="/etc/passwd"), "is not the name of a safetensors file"),
        (lambda files: files.update(a="pytorch_model.bin"), "is not the name of a safetensors file"),
        (lambda files: files.update(a=1), "weight_map"),
        (lambda files: files.clear(), "weight_map"),
    ],
    ids=range(8),
)
def test_an_index_that_does_not_agree(
    read: Read, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file({"a": STATE["a"]}, tmp_path / "model-1.safetensors")
    edit_index(write_shards(folder), edit)
    with pytest.raises(CheckpointError, match=reason):
        read(folder)


def test_a_corrupt_index(read: Read, tmp_path: Path) -> None:
    write_shards(tmp_path).write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read(tmp_path)


def test_no_weights_and_pickles(read: Read, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing$"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"only safetensors are loaded, not pytorch_model\.bin"):
        read(tmp_path)
