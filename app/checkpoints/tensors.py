"""Weights: safetensors files to tensors.

Knows nothing of networks: which keys and shapes are right is for app/families to say.

The format (github.com/huggingface/safetensors): 8 bytes of header length, a JSON header of {name: dtype, shape,
data_offsets}, the data. The library reads it, and refuses holes, overlaps, tails, short files and shapes that do not
fill their place. What it lets pass is refused here before it sees the file: headers that cost memory to parse, a key
twice, number formats that no network here is stored in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from app.cards.files import open_file, refuse_foreign, weight_files
from app.errors import CheckpointError

State = dict[str, torch.Tensor]

HEADER_LIMIT = 16 * 2**20
TENSOR_LIMIT = 20_000
COMMAS = 8
"""For each tensor: four between its fields, those of its shape, and some for the metadata."""

_FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_outline(place: Path, prefix: str = "") -> State:
    """Names, shapes and number formats of the tensors of a folder or a file, on the meta device, from headers alone.

    prefix: of the names to read; number formats of others do not matter. Reads no tensor. Raises CheckpointError as
    `read_states`, but for what only the data can show.
    """
    outline = {}
    for file in _headers(place, prefix):
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                if key.startswith(prefix):
                    part = opened.get_slice(key)
                    outline[key] = torch.empty(part.get_shape(), dtype=_FORMATS[part.get_dtype()], device="meta")
    return outline


def read_states(place: Path, prefix: str = "") -> Iterator[State]:
    """The tensors whose names begin so: of a file, or of a component's folder, one of its files after another.

    The tensors may be maps of the file: who lets go of a shard before the next never holds two. Raises CheckpointError
    naming the file: missing, not whole, over 16 MB of header or 20,000 tensors, shards and index that do not agree; all
    headers are checked before the first tensor is read.
    """
    for file in _headers(place, prefix):
        with _opened(file) as opened:
            yield {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)}  # noqa: SIM118


def read_state(place: Path) -> State:
    """All tensors of a folder or a file at once. Raises CheckpointError as `read_states`."""
    state: State = {}
    for shard in read_states(place):
        state.update(shard)
    return state


def read_names(file: Path) -> set[str]:
    """The names of all tensors of one file, whatever their number formats. Raises CheckpointError as `read_states`."""
    return set(_header(file))


def _headers(folder: Path, prefix: str) -> dict[Path, dict[str, Any]]:
    """The header of every shard, checked against the index."""
    shards = weight_files(folder)
    headers = {file: _header(file) for file in shards}
    for file, header in headers.items():
        _formats(file, header, prefix)
    if sum(len(header) for header in headers.values()) > TENSOR_LIMIT:
        raise CheckpointError(f"{folder}: over {TENSOR_LIMIT} tensors")
    for file, listed in shards.items():
        wrong = sorted(set(headers[file]) ^ listed) if listed is not None else []
        if wrong:
            raise CheckpointError(f"{file}: {wrong[0]} is in only one of this file and the index")
    return headers


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file in the library's hands, which checks the header again and the length of the data."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error


def _header(file: Path) -> dict[str, Any]:
    """The header, without its metadata; no more of it is checked than the library would let pass."""
    refuse_foreign(file)
    try:
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes, shorter than its header says")
            if length > HEADER_LIMIT:
                raise CheckpointError(f"{file}: a header of {length} bytes, over {HEADER_LIMIT}")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error}") from error
    # NOTE: counted before it is parsed: a million entries, or values, would take seconds and a gigabyte.
    if raw.count(b'"data_offsets"') > TENSOR_LIMIT or raw.count(b",") > COMMAS * TENSOR_LIMIT:
        raise CheckpointError(f"{file}: over {TENSOR_LIMIT} tensors")
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if not isinstance(entry["dtype"], str):
                raise ValueError(f"{key} has no number format")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: invalid header: {error}") from error
    return dict(header)


def _formats(file: Path, header: Mapping[str, Any], prefix: str) -> None:
    """Refuse number formats that no network here is stored in."""
    for key, entry in header.items():
        if key.startswith(prefix) and entry["dtype"] not in _FORMATS:
            form = entry["dtype"]
            words = f"{form} (8-bit floats)" if form.startswith("F8_") else form
            more = ": take its bfloat16, float16 or float32 file" if form.startswith(("F8_", "F4", "F6")) else ""
            raise CheckpointError(f"{file}: {key} has number format {words}, which this server does not load{more}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found
