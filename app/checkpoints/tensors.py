"""Tensors and files of weights: safetensors, and for an offline conversion alone the zips that torch.save writes.

The safetensors format (github.com/huggingface/safetensors): 8 bytes of header length, a JSON header of {name: dtype,
shape, data_offsets}, the data. The library reads it, and refuses holes, overlaps, tails, short files and shapes that do
not fill their place. What it lets pass is refused here: before it sees the file, headers that cost memory to parse;
after that, a key twice and number formats that no network here is stored in.

A torch file is a pickle, which can run code, so torch's weights-only unpickler reads it, and what it refuses stays
refused. That stops code, not bombs: entries that are compressed, share their bytes or lie outside the archive are
refused before torch sees the file, and tensors that are more than their bytes after it.
"""

import argparse
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from app.cards.files import STEMS, explained, open_file, refuse_foreign, weight_files, write_json
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

PICKLE_LIMIT = 16 * 2**20
"""Bytes of data.pkl, which has names, shapes and offsets: a DiT-XL's has 40 kB, one with an optimizer's 200 kB. So many
are also read for the zip's directory, which is at the end of the file."""

WRAPPERS = ("ema", "model", "state_dict")
"""Where the weights may stand, the best first: the authors' train.py saves "model", "ema", "opt" and "args"."""

_END = b"PK\x05\x06"
_END_BYTES = 22


def read_outline(place: Path, prefix: str = "") -> State:
    """Names, shapes and number formats of the tensors of a folder or a file, on the meta device, from headers alone.

    prefix: of the names to read; number formats of others do not matter. Reads no tensor. Raises CheckpointError as
    `read_states`, but for what only the data can show.
    """
    outline = {}
    for file in _checked(place, prefix):
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                if key.startswith(prefix):
                    part = opened.get_slice(key)
                    outline[key] = torch.empty(part.get_shape(), dtype=_FORMATS[part.get_dtype()], device="meta")
    return outline


def read_states(place: Path, prefix: str = "") -> Iterator[State]:
    """The tensors with names that begin so: of a file, or of a component's folder, one of its files after another.

    The tensors may be maps of the file: a caller that drops a shard before the next never has two in memory. Raises
    CheckpointError naming the file: missing, not whole, over 16 MB of header or 20,000 tensors, shards and index that
    do not agree; all headers are checked before the first tensor is read.
    """
    for file in _checked(place, prefix):
        with _opened(file) as opened:
            yield {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)}  # noqa: SIM118


def read_names(file: Path) -> set[str]:
    """The names of all tensors of one file, whatever their number formats. Raises CheckpointError as `read_states`."""
    count = _count_tensors(file)
    with _opened(file) as opened:
        names = set(opened.keys())
    if len(names) != count:
        raise CheckpointError(f"{file}: invalid header: a key twice")
    return names


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that the header of a file has beside its tensors. Raises CheckpointError as `read_states`."""
    read_names(file)
    with _opened(file) as opened:
        return opened.metadata() or {}


def write_shards(folder: Path, outline: State, most: int, tensor: Callable[[str], torch.Tensor]) -> None:
    """Write safetensors, with one file at a time in memory, and the index of several.

    outline: names, shapes and number formats, by which the tensors are divided. most: bytes of a file, except where one
    tensor is larger. tensor: makes the one of a name, which shares no memory with others.
    """
    pattern = f"{STEMS[0]}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(outline, filename_pattern=pattern, max_shard_size=most)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = folder / f"{STEMS[0]}.safetensors.index.json"
        write_json(index, {"metadata": {}, "weight_map": split.tensor_to_filename})


def read_torch_zip(file: Path) -> State:
    """The tensors of a file of torch.save, as maps of it. Of what train.py saves: those under "ema", else "model".

    Raises CheckpointError naming the file: not a whole torch zip, compressed or overlapping entries, a pickle of
    anything but tensors and plain values, tensors that are more than their bytes.
    """
    refuse_foreign(file, "torch")
    try:
        with open_file(file) as stream:
            stream.seek(max(file.stat().st_size - PICKLE_LIMIT, 0))
            tail = stream.read(PICKLE_LIMIT)
        # The end record is the file's last bytes, so that every reader finds the same directory.
        if tail[-_END_BYTES:][:4] != _END:
            raise CheckpointError(f"{file}: not a whole torch zip (torch.save of version 1.6 or later writes one)")
        with zipfile.ZipFile(io.BytesIO(tail)) as archive:
            _check_entries(file, archive.infolist())
        # NOTE: Namespace has the options of train.py; it is plain data, and nothing of it is called.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"asks for {found[1]}, which is not a tensor" if found else "is not that of tensors"
        raise CheckpointError(f"{file}: its pickle {why}; nothing of it was run") from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever a spoiled pickle makes the unpickler do, the file is the reason
        why = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise CheckpointError(f"{file}: not a whole torch zip: {why}") from error
    return _unwrapped(file, loaded)


def _checked(place: Path, prefix: str) -> list[Path]:
    """Every shard of a folder, or the one file, with a header that agrees with the index."""
    total, shards = 0, weight_files(place)
    for file, listed in shards.items():
        names = read_names(file)
        total += len(names)
        if total > TENSOR_LIMIT:
            raise CheckpointError(f"{place}: over {TENSOR_LIMIT} tensors")
        if wrong := sorted(names ^ listed) if listed is not None else []:
            raise CheckpointError(f"{file}: {wrong[0]} is in only one of this file and the index")
        with _opened(file) as opened:
            for key in filter(lambda name: name.startswith(prefix), sorted(names)):
                _check_format(file, key, opened.get_slice(key).get_dtype())
    return list(shards)


def _count_tensors(file: Path) -> int:
    """The number of entries of a header, counted before it is parsed: a million would take seconds and a gigabyte."""
    refuse_foreign(file)
    with explained(file), open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file}: truncated: {size} bytes, shorter than its header says")
        if length > HEADER_LIMIT:
            raise CheckpointError(f"{file}: a header of {length} bytes, over {HEADER_LIMIT}")
        raw = stream.read(length)
    count = raw.count(b'"data_offsets"')
    if count > TENSOR_LIMIT or raw.count(b",") > COMMAS * TENSOR_LIMIT:
        raise CheckpointError(f"{file}: over {TENSOR_LIMIT} tensors")
    return count


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file opened by the library, which checks its header and the length of its data."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error


def _check_format(file: Path, key: str, form: str) -> None:
    """Refuse number formats that no network here is stored in."""
    if form not in _FORMATS:
        words = f"{form} (8-bit floats)" if form.startswith("F8_") else form
        more = ": take its bfloat16, float16 or float32 file" if form.startswith(("F8_", "F4", "F6")) else ""
        raise CheckpointError(f"{file}: {key} has number format {words}, which this server does not load{more}")


def _check_entries(file: Path, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > TENSOR_LIMIT:
        raise CheckpointError(f"{file}: {len(entries)} entries, over {TENSOR_LIMIT}")
    names = [entry.filename for entry in entries]
    root = names[0].partition("/")[0] if names else ""
    if f"{root}/data.pkl" not in names or len(set(names)) != len(names):
        raise CheckpointError(f"{file}: a zip, but not one that torch.save wrote")
    for entry in entries:
        parts = entry.filename.split("/")
        if parts[0] != root or ".." in parts or "" in parts or "\\" in entry.filename or "\0" in entry.filename:
            raise CheckpointError(f"{file}: {entry.filename!r} is not the name of an entry that torch.save writes")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(f"{file}: {entry.filename!r} is compressed, which torch.save does not do")
        if entry.file_size > PICKLE_LIMIT and len(parts) != 3:
            raise CheckpointError(f"{file}: {entry.filename!r} has {entry.file_size} bytes, over {PICKLE_LIMIT}")
    total = sum(entry.file_size for entry in entries)
    if total > file.stat().st_size:
        raise CheckpointError(f"{file}: its entries have {total} bytes, more than the file: they overlap")


def _unwrapped(file: Path, loaded: Any) -> State:
    """The state of a checkpoint, each tensor whole and its own."""
    if isinstance(loaded, dict):
        loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{file}: is a {type(loaded).__name__}, not tensors by their names")
    state: State = {}
    total = 0
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file}: {str(key)[:80]!r} is of type {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
            raise CheckpointError(f"{file}: {key} is not a plain tensor of numbers")
        total += value.numel() * value.itemsize
        if not value.is_contiguous() or total > file.stat().st_size:
            raise CheckpointError(f"{file}: {key} has shape {list(value.shape)}, more than its bytes in the file")
        # A state dict of a distributed run names every weight after the module that wrapped the network.
        state[key.removeprefix("module.")] = value.detach()
    return state
