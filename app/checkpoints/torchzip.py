"""Torch zip: the tensors of a `.pt` that torch.save wrote, for an offline conversion alone. A server never reads one.

Knows nothing of networks.

A pickle can run code, so torch's weights-only unpickler reads it, and what it refuses stays refused. That stops code,
not bombs: entries that are compressed, share their bytes or lie outside the archive are refused before torch sees the
file, and tensors that are more than their bytes after it.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from app.cards.files import refuse_foreign
from app.checkpoints.tensors import TENSOR_LIMIT, State
from app.errors import CheckpointError

PICKLE_LIMIT = 16 * 2**20
"""Bytes of data.pkl, which holds names, shapes and offsets: a DiT-XL's has 40 kB, one with an optimizer's 200 kB."""

WRAPPERS = ("ema", "model", "state_dict")
"""Where the weights may stand, the best first: the authors' train.py saves "model", "ema", "opt" and "args"."""

_END = b"PK\x05\x06"
_END_BYTES = 22


class _Short(io.FileIO):
    """A file of which no more than a pickle's limit is read at once: the zip library reads a directory whole."""

    def read(self, size: int | None = -1) -> bytes:
        whole = size is None or size < 0
        found = super().read(PICKLE_LIMIT + 1 if whole else min(int(size or 0), PICKLE_LIMIT + 1))
        if len(found) > PICKLE_LIMIT:
            raise zipfile.BadZipFile("a directory of too many bytes")
        return found


def read_torch_zip(file: Path) -> State:
    """The tensors, as maps of the file. Of what train.py saves: those under "ema", else "model".

    Raises CheckpointError naming the file: not a whole torch zip, compressed or overlapping entries, a pickle of
    anything but tensors and plain values, tensors that are more than their bytes.
    """
    refuse_foreign(file, "torch")
    try:
        with _Short(file) as stream:
            _check_end(file, stream)
            with zipfile.ZipFile(stream) as archive:
                _check_entries(file, archive.infolist())
        # NOTE: Namespace holds the options of train.py; it is plain data, and nothing of it is called.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: {_refused(str(error))}; nothing of it was run") from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever a spoiled pickle makes the unpickler do, the file is the reason
        raise CheckpointError(f"{file}: not a whole torch zip: {_short(error)}") from error
    return _tensors(file, loaded)


def _check_end(file: Path, stream: io.FileIO) -> None:
    """The end record is the file's last bytes, so that every reader finds the same directory."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(size - _END_BYTES, 0))
    if stream.read(_END_BYTES)[:4] != _END:
        raise CheckpointError(f"{file}: not a whole torch zip (torch.save of version 1.6 or later writes one)")
    stream.seek(0)


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
    held = sum(entry.file_size for entry in entries)
    if held > file.stat().st_size:
        raise CheckpointError(f"{file}: its entries have {held} bytes, more than the file: they overlap")


def _tensors(file: Path, loaded: Any) -> State:
    """The state of a checkpoint, each tensor whole and its own."""
    for wrapper in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{file}: holds {type(loaded).__name__}, not tensors by their names")
    state: State = {}
    held = 0
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{file}: {str(key)[:80]!r} holds {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
            raise CheckpointError(f"{file}: {key} is not a plain tensor of numbers")
        held += value.numel() * value.itemsize
        if not value.is_contiguous() or held > file.stat().st_size:
            raise CheckpointError(f"{file}: {key} has shape {list(value.shape)}, more than the file holds of it")
        # A state dict of a distributed run names every weight after the module that wrapped the network.
        state[key.removeprefix("module.")] = value.detach()
    return state


def _refused(message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return f"its pickle asks for {found[1]}, which is not a tensor" if found else "its pickle is not that of tensors"


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
