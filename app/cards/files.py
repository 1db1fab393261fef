"""Read files that may come from a stranger: regular ones only, up to a bound, and nothing in them is trusted.

Of weights only names and first bytes are read here; `app/checkpoints/tensors.py` reads their headers.
"""

import errno
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from app.errors import CardError, CheckpointError

INDEX = "model_index.json"

JSON_LIMIT = 16 * 2**20
"""Bytes of a checkpoint's JSON, of which an index of shards is the largest."""

TOML_LIMIT = 2**20
"""Bytes of a card or of a file of keys."""

TOKENIZER_LIMIT = 64 * 2**20
"""Bytes of a file of a tokenizer; the largest that is served (T5's) has 2.4 MB."""

PICKLES = (".bin", ".pt", ".ckpt", ".pth", ".pickle", ".pkl")
CONVERT = "`instep models convert` makes them of the DiT authors' .pt"

STEMS = ("diffusion_pytorch_model", "model")
"""Names of files of weights."""
BIN = f"{STEMS[0]}.bin"

Variant = Literal["", "fp16"]
"""Which files of weights: the plain ones, or copies in another number format, which some repositories have too."""
VARIANTS: tuple[Variant, ...] = ("", "fp16")

NO_PARTS = ("scheduler", "feature_extractor", "safety_checker", "image_encoder")
"""Entries of a model_index.json that are not served, such as the safety checker of SD 1.5."""

_FIRST = 512
"""Bytes at the start of a file that are compared; a Git LFS pointer has about 130 in all."""

PART = re.compile(r"[a-z][a-z0-9_]{0,63}")
"""Names of parts, which become folders."""

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
"""The first bytes of files that people have in place of a checkpoint, with the words for an error."""

_NO_SAFETENSORS = (
    (r"PK\x03\x04|\x80[\x02-\x05]", f"a torch file, whatever its name says: only safetensors are loaded ({CONVERT})"),
    (r"[\t\n\r\x20-\x7e]{16}", "a text, not a checkpoint; it begins {first!r}"),
    (r"\Z", "an empty file"),
)
"""The first bytes of files that are no safetensors, but may be another file of a checkpoint."""


def open_file(file: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also for a pipe or a device, without waiting for one."""
    if stat.S_ISREG(os.stat(file).st_mode):  # to open a device may set it off
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(file))


def read_file(file: Path, limit: int, check: Callable[[int], None] = lambda opened: None) -> bytes:
    """Read all of a regular file. check: called with its descriptor before that.

    Raises OSError, also for more than `limit` bytes, and what `check` raises.
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
    """Read a card or a file of keys. Raises OSError as `read_file`, ValueError and RecursionError for bad TOML."""
    return tomllib.loads(read_file(file, limit, check).decode())


def write_json(file: Path, content: Any) -> None:
    """Write JSON as a person reads it."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_toml(file: Path, table: Mapping[str, Any]) -> None:
    """Write a card, a line for each of its fields."""
    file.write_text("".join(f"{key} = {to_toml(value)}\n" for key, value in table.items()), encoding="utf-8")


def to_toml(value: Any) -> str:
    """A value as TOML, tables in one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {to_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def explained(file: Path, kind: type[Exception] = OSError) -> Iterator[None]:
    """Turn an error of this kind into a CheckpointError that names the file."""
    try:
        yield
    except kind as error:
        raise CheckpointError(f"{file}: {getattr(error, 'strerror', None) or error}") from error


def refuse_endless(file: Path) -> None:
    """Raises CheckpointError for a file that a library will read: it is not regular, or too large for a tokenizer."""
    with explained(file), open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
    if size > TOKENIZER_LIMIT:
        raise CheckpointError(f"{file}: over {TOKENIZER_LIMIT} bytes")


def refuse_foreign(file: Path, wanted: Literal["safetensors", "torch", "json"] = "safetensors") -> None:
    """Raises CheckpointError for a file that cannot be read, or begins like another kind of file."""
    with explained(file), open_file(file) as stream:
        first = stream.read(_FIRST).decode("latin-1")
    # NOTE: a safetensors' first eight bytes are a length, which may look like anything; a brace follows it.
    if wanted == "safetensors" and first[8:9] == "{":
        return
    for pattern, words in _FOREIGN if wanted != "safetensors" else (*_FOREIGN, *_NO_SAFETENSORS):
        if found := re.match(pattern, first, re.IGNORECASE):
            raise CheckpointError(f"{file}: is {words.format(first=' '.join(first[:60].split()), **found.groupdict())}")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of at most 16 MB. Raises CheckpointError naming the file."""
    with explained(file):
        try:
            content = json.loads(read_file(file, JSON_LIMIT))
        except FileNotFoundError as error:
            raise CheckpointError(f"{file}: missing") from error
        except (ValueError, RecursionError) as error:
            refuse_foreign(file, "json")
            raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def read_classes(index: Path) -> dict[str, str]:
    """Read the class of each part that a model_index.json names, without absent parts and those that are not served.

    Raises CheckpointError naming the file: missing, a bad name of a part, not a pair of library and class.
    """
    found = {}
    for name, entry in read_json(index).items():
        if name.startswith("_") or name in NO_PARTS or not isinstance(entry, list) or entry == [None, None]:
            continue
        if not PART.fullmatch(name):
            raise CheckpointError(f'{index}: "{name}" is not the name of a part')
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise CheckpointError(f"{index}: {name}: not a pair of library and class")
        found[name] = str(entry[1])
    return found


def read_labels(index: Path) -> tuple[str, ...]:
    """Read the class names in order of id, none without `id2label`. Raises CardError unless the ids are 0 to n - 1."""
    named: Any = None
    try:
        named = json.loads(read_file(index, JSON_LIMIT)).get("id2label") or {}
        labels = tuple(named[str(number)] for number in range(len(named)))
        if not all(isinstance(label, str) for label in labels):
            raise TypeError("a name that is not a text")
    except KeyError as error:
        raise CardError(f"{index}: id2label: {len(named)} classes, but none has the id {error.args[0]}") from error
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CardError(f"{index}: id2label: {error}") from error
    return labels


def cached_file(repo: str, revision: str | None, name: str = INDEX) -> Path | None:
    """Find a file of a Hub repository's snapshot in the local cache; None before it is downloaded."""
    # NOTE: imported late, by cards that name a repository alone: it takes a third of a second.
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, name, revision=revision)
    except ValueError:  # no name of a repository: its load says so
        return None
    return Path(found) if isinstance(found, str) else None


def weight_names(first: Variant = "") -> Iterator[tuple[str, str]]:
    """The names that an index of shards and a single file may have, in their order; the first that exists counts.

    first: the variant that comes before the others. A server reads the plain files where it finds several.
    """
    for variant in sorted(VARIANTS, key=lambda one: one != first):
        word = f".{variant}" if variant else ""
        yield from ((f"{stem}.safetensors.index{word}.json", f"{stem}{word}.safetensors") for stem in STEMS)


def weight_files(place: Path) -> dict[Path, set[str] | None]:
    """Find the safetensors of a part's folder (or the one file), each with its keys by the index of shards.

    The keys are None without an index. Raises CheckpointError: one is missing, or the index is not one.
    """
    if place.exists() and not place.is_dir():
        return {place: None}
    for index, single in weight_names():
        if (place / index).exists():
            return _shards(place / index)
        if (place / single).exists():
            return {place / single: None}
    others = sorted(path.name for path in place.glob("*") if path.suffix in PICKLES)
    hint = f" (only safetensors are loaded, not {others[0]}; {CONVERT})" if others else ""
    raise CheckpointError(f"{place / STEMS[0]}.safetensors: missing{hint}")


def _shards(index: Path) -> dict[Path, set[str] | None]:
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
