"""Files: a JSON file of a checkpoint, the files that a part's weights are in, and what a file is that is no checkpoint.

Only names and first bytes are read; what tensors a file holds is for `app/pool/weights.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from app.errors import CheckpointError

JSON_LIMIT = 16 * 2**20
"""Bytes; the largest real tokenizer.json (T5's) has 2.4 MB and is not read through here."""

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


def foreign(file: Path, wanted: Wanted = "safetensors") -> str | None:
    """What this file is instead of the kind that is wanted, in words; None where its first bytes do not show it.

    Raises OSError.
    """
    with file.open("rb") as stream:
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
        if file.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{file}: over {JSON_LIMIT} bytes")
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        if file.is_file():
            refuse_foreign(file, "json")
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def weight_files(place: Path) -> dict[Path, set[str] | None]:
    """The safetensors of a part's folder, or the one file, each with the keys that the index of shards promises.

    None stands for the keys where there is no index. Raises CheckpointError: one is missing, or the index is not one.
    """
    if place.is_file():
        return {place: None}
    for stem in STEMS:
        index, single = place / f"{stem}.safetensors.index.json", place / f"{stem}.safetensors"
        if index.is_file():
            return _indexed(index)
        if single.is_file():
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
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: missing, though the index names it")
        shards[index.parent / name] = {key for key, file in listed.items() if file == name}
    return shards
