"""Keys: who may ask, and what each may have: its share of the device and its limits.

A key itself is never kept, only its SHA-256.
"""

import hmac
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from app.cards.catalog import Registry
from app.cards.files import read_toml
from app.errors import ModelNotFound, SettingsError, first_problem
from app.settings import Settings

ADMIN = "admin"  # the name of the admin key in requests, metrics and logs
KEY_LENGTH = 16  # least characters of a key
FILE_LIMIT = 16 * 1024 * 1024  # bytes of a file of keys that are read; a key takes about 100

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(rf"[!-~]{{{KEY_LENGTH},512}}")
_KEY_RULE = f"a key is {KEY_LENGTH} to 512 visible ASCII characters without spaces"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One client. name: its tenant in requests, metrics and logs. digest: SHA-256 of the key.

    weight: its share of the device beside the others'. priority: the highest that its requests may name.
    models, loras: those that it may use, by id and by name, empty for all. queue: most of its own device seconds that
    may wait, None for its share.
    """

    name: str
    digest: bytes = field(default=b"", repr=False)
    weight: float = 1.0
    priority: int = 10
    models: frozenset[str] = frozenset()
    queue: float | None = None
    loras: frozenset[str] = frozenset()


NOBODY = ApiKey("")  # every client of a server without keys


@dataclass(frozen=True, slots=True)
class Keyring:
    """Every key that a server knows. Without clients it is open to all; without an admin its admin routes are shut.

    texts: the clients of API_KEYS alone, each with words for where it is.
    """

    clients: tuple[ApiKey, ...] = ()
    admin: ApiKey | None = None
    texts: tuple[tuple[str, ApiKey], ...] = ()

    def find(self, token: bytes) -> ApiKey | None:
        """The key that this is. Every digest is compared, and in constant time: how long it takes tells nothing."""
        digest = sha256(token).digest()
        keys = (*self.clients, self.admin) if self.admin else self.clients
        found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
        return found[0] if found else None


def read_keys(settings: Settings, old: Keyring | None = None) -> Keyring:
    """The keys of API_KEYS, API_KEYS_FILE and ADMIN_KEY; where there is an old keyring, only the file is read.

    Raises SettingsError naming the file and the field, or the setting and the entry; never with a key in its message. A
    file that others may change is refused. A setting that is not empty and holds no key is an error too: it must not
    open the server to all.
    """
    texts = old.texts if old else tuple(_from_text(settings.api_keys))
    found = [("api_keys", where, key) for where, key in texts]
    if settings.api_keys_file:
        found += [("api_keys_file", where, key) for where, key in _from_file(Path(settings.api_keys_file).expanduser())]
    try:
        admin = ApiKey(ADMIN, _digest(settings.admin_key)) if settings.admin_key else None
    except ValueError as error:
        raise SettingsError(f"admin_key: {error}", param="admin_key") from None
    admin = old.admin if old else admin
    names, digests = {ADMIN} if admin else set(), {admin.digest: ADMIN} if admin else {}
    for setting, where, key in found:
        if key.name in names:
            raise SettingsError(f"{where}: the name {key.name} is taken", param=setting)
        if key.digest in digests:
            raise SettingsError(f"{where}: the same key as that of {digests[key.digest]}", param=setting)
        names.add(key.name)
        digests[key.digest] = key.name
    return Keyring(tuple(key for _, _, key in found), admin, texts)


def with_ids(keys: Keyring, registry: Registry) -> Keyring:
    """The keys with their models by id, also where a card's alias was used. Raises SettingsError for unknown names."""
    clients = []
    for key in keys.clients:
        try:
            ids = frozenset(registry.find(name).id for name in key.models)
        except ModelNotFound as error:
            why = "".join(map(registry.all.reason, sorted(key.models)))
            message = f"keys.{key.name}.models: {error.message}{why}"
            raise SettingsError(message, param="api_keys_file") from None
        clients.append(replace(key, models=ids))
    return replace(keys, clients=tuple(clients))


def _from_text(text: str) -> Iterator[tuple[str, ApiKey]]:
    """`name=key` or bare keys, comma separated, each with words for where it is.

    NOTE: errors do not show the name: it may be half of a key with a "=".
    """
    for number, entry in enumerate(text.split(",") if text else [], 1):
        name, equals, key = (part.strip() for part in entry.partition("="))
        where = f"api_keys: entry {number}"
        if equals and not _NAME.fullmatch(name):
            raise SettingsError(f"{where}: a name is 1 to 64 of A-Z a-z 0-9 . _ -", param="api_keys")
        try:
            digest = _digest(key if equals else name)
        except ValueError as error:
            hint = '; one with "=" in it needs a name before it: name=key' if equals else ""
            raise SettingsError(f"{where}: {error}{hint}", param="api_keys") from None
        yield where, ApiKey(name if equals else f"key-{number}", digest)


class _Entry(BaseModel):
    """[keys.<name>] of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    key: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{64}$")] | None = None
    weight: Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)] = 1.0
    priority: Annotated[int, Field(ge=-10, le=10)] = 10
    models: Annotated[list[str], Field(min_length=1)] | None = None
    queue: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    loras: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        self.digest()
        return self

    def digest(self) -> bytes:
        """SHA-256 of the key. Raises ValueError."""
        return bytes.fromhex(self.sha256) if self.sha256 else _digest(self.key or "")


_Entries = Annotated[dict[Annotated[str, Field(pattern=rf"^{_NAME.pattern}$")], _Entry], Field(min_length=1)]
_FILE = TypeAdapter(dict[Literal["keys"], _Entries], config=ConfigDict(strict=True, hide_input_in_errors=True))


def _from_file(file: Path) -> Iterator[tuple[str, ApiKey]]:
    """The keys of a TOML file. NOTE: `from None`: an error about it may have the keys in it."""
    try:
        tables = read_toml(file, partial(_refuse_open, file), FILE_LIMIT)
        read = _FILE.validate_python(tables or {"keys": {}})["keys"]
    except ValidationError as error:
        place, reason = first_problem(error.errors(include_input=False))
        # NOTE: a key may stand where a name belongs; what is shorter than any key is none.
        where = ".".join(part if len(part) < KEY_LENGTH else "..." for part in place if part != "[key]")
        raise _refused(f"{file}: {where}: {reason}") from None
    except UnicodeDecodeError:
        raise _refused(f"{file}: not UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(f"{file}: {(isinstance(error, OSError) and error.strerror) or error}") from None
    for name, entry in read.items():
        models, loras = frozenset(entry.models or ()), frozenset(entry.loras or ())
        key = ApiKey(name, entry.digest(), entry.weight, entry.priority, models, entry.queue, loras)
        yield f"{file}: keys.{name}", key


def _refuse_open(file: Path, opened: int) -> None:
    """Raise SettingsError if somebody else than root and the server's own user could change this file.

    opened: its descriptor, so that what is checked is what is read. Where it is a link, the folders of both ends count.
    NOTE: a container's secrets and their folder may belong to a user of the host; they are mounted read-only.
    """
    facts, own = os.fstat(opened), (0, os.geteuid())
    if facts.st_mode & 0o022:
        mode = f"{stat.S_IMODE(facts.st_mode):04o}"
        raise _refused(f"{file}: others may write it (mode {mode}): chmod go-w {file}")
    if os.fstatvfs(opened).f_flag & os.ST_RDONLY:
        return
    if facts.st_uid not in own:
        raise _refused(f"{file}: it belongs to user {facts.st_uid}, who is neither root nor the user of this process")
    for folder in dict.fromkeys((file.absolute().parent, file.resolve().parent)):
        facts = folder.stat()
        if facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX:
            raise _refused(f"{file}: others may replace it, as they may write into its folder: chmod go-w {folder}")
        if facts.st_uid not in own:
            raise _refused(f"{file}: its folder {folder} belongs to user {facts.st_uid}, who may replace it")


def _refused(message: str) -> SettingsError:
    return SettingsError(message, param="api_keys_file")


def _digest(key: str) -> bytes:
    if not _KEY.fullmatch(key):
        raise ValueError(_KEY_RULE)
    return sha256(key.encode()).digest()
