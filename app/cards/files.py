"""Files: the one way to read a stranger's file, a checkpoint's JSON, and which files a part's weights are in.

A pipe, a device or an endless file must not hold who reads it. Of weights only names and first bytes are read here;
what tensors a file holds is for `app/checkpoints/tensors.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

from app.errors import CheckpointError

JSON_LIMIT = 16 * 2**20
"""Bytes of a checkpoint's JSON, of which an index of shards is the largest."""

TOML_LIMIT = 2**20
"""Bytes of a card or of a file of keys."""

TOKENIZER_LIMIT = 64 * 2**20
"""Bytes of a file of a tokenizer; the largest that is served (T5's) has 2.4 MB."""

PICKLES = (".bin", ".pt", ".ckpt", ".pth", ".pickle", ".pkl")
CONVERT = "`instep models convert` makes them of the DiT authors' .pt"

STEMS = ("diffusion_pytorch_model", "model")
"""What weights are called, the first that is there."""

_FIRST = 512
"""Bytes of a file that are looked at; a Git LFS pointer has about 130 in all."""

Wanted = Literal["safetensors", "torch", "json"]

_FOREIGN: tuple[tuple[str, str], ...] = (
    (
        r"version https://git-lfs\.github\.com/spec/v1\n(?:.*\n)*?size (?P<size>\d{1,18})",
        "a Git LFS pointer to a file of {size} bytes, not the file: `git lfs pull` gets it",
    ),
    (r"version https://git-lfs", "a Git LFS pointer, not the file: `git lfs pull` gets it"),
    (r"GGUF", "a GGUF file, which this server does not load: take the safetensors of the same model"),
    (
        r"\s*(?:<!--[^>]*-->\s*)*<(?:!doctype html|html|head|\?xml|!--)",
        "a web page, not a checkpoint: the download got a page (of a login, a licence or an error); take it again",
    ),
    (r"\x1f\x8b\x08|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed archive: unpack it first"),
)
"""What files begin with that people have in place of a checkpoint, and what to say of them."""

_TORCH = r"PK\x03\x04|\x80[\x02-\x05]"
_TEXT = r"[\t\n\r\x20-\x7e]{16}"


def open_file(file: Path) -> BinaryIO:
    """A regular file, to read. Raises OSError; at a pipe or a device too, and without waiting for one."""
    if stat.S_ISREG(os.stat(file).st_mode):  # to open a device may set it off
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_file(file: Path, limit: int, check: Callable[[int], None] = lambda opened: None) -> bytes:
    """All of a regular file. check: called with its descriptor first, so that what is checked is what is read.

    Raises OSError, also where it has more than `limit` bytes, and what `check` raises.
    """
    with open_file(file) as stream:
        check(stream.fileno())
        content = stream.read(limit + 1) or b""  # none where a read would have to wait
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"over {limit} bytes", str(file))
    return content


def read_toml(
    file: Path, check: Callable[[int], None] = lambda opened: None, limit: int = TOML_LIMIT
) -> dict[str, Any]:
    """A card or a file of keys, by `read_file`. Raises ValueError and RecursionError too: it is not UTF-8, not TOML, or
    has a number of thousands of digits."""
    return tomllib.loads(read_file(file, limit, check).decode())


def refuse_endless(file: Path, limit: int = TOKENIZER_LIMIT) -> None:
    """Raises CheckpointError where a file that a library will read is not regular, or has more than `limit` bytes."""
    try:
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    if size > limit:
        raise CheckpointError(f"{file}: over {limit} bytes")


def foreign(file: Path, wanted: Wanted = "safetensors") -> str | None:
    """What this file is instead of the kind that is wanted, in words; None where its first bytes do not show it.

    Raises OSError.
    """
    with open_file(file) as stream:
        first = stream.read(_FIRST).decode("latin-1")
    # NOTE: a safetensors' first eight bytes are a length, which may look like anything; a brace follows it.
    if wanted == "safetensors" and first[8:9] == "{":
        return None
    for pattern, words in _FOREIGN:
        if found := re.match(pattern, first, re.IGNORECASE):
            return words.format(**found.groupdict())
    if wanted != "safetensors":
        return None
    if re.match(_TORCH, first):
        return f"a torch file, whatever its name says: only safetensors are loaded ({CONVERT})"
    if re.match(_TEXT, first):
        return f"a text, not a checkpoint; it begins {' '.join(first[:60].split())!r}"
    return None if first else "an empty file"


def refuse_foreign(file: Path, wanted: Wanted = "safetensors") -> None:
    """Raises CheckpointError where a file is something else than is wanted, in words, or cannot be read."""
    try:
        found = foreign(file, wanted)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    if found:
        raise CheckpointError(f"{file}: is {found}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MB. Raises CheckpointError naming the file."""
    try:
        content = json.loads(read_file(file, JSON_LIMIT))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        refuse_foreign(file, "json")
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def weight_files(place: Path) -> dict[Path, set[str] | None]:
    """The safetensors of a part's folder, or the one file, each with the keys that the index of shards promises.

    None stands for the keys where there is no index. Raises CheckpointError: one is missing, or the index is not one.
    """
    if place.exists() and not place.is_dir():
        return {place: None}
    for stem in STEMS:
        index, single = place / f"{stem}.safetensors.index.json", place / f"{stem}.safetensors"
        if index.exists():
            return _indexed(index)
        if single.exists():
            return {single: None}
    others = sorted(path.name for path in place.glob("*") if path.suffix in PICKLES)
    hint = f" (only safetensors are loaded, not {others[0]}; {CONVERT})" if others else ""
    raise CheckpointError(f"{place / STEMS[0]}.safetensors: missing{hint}")


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of keys and file names")
    shards: dict[Path, set[str] | None] = {}
    for name in sorted(set(listed.values())):
        # NOTE: a name with a separator could leave the folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f'{index}: "{name}" is not the name of a safetensors file in this folder')
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent / name}: missing, though the index names it")
        shards[index.parent / name] = {key for key, file in listed.items() if file == name}
    return shards
