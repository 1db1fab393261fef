"""Settings: one flat frozen class. A field is an environment variable INSTEP_<NAME> and a flag of `instep serve`.

The description of a field is its documentation: the table in deploy/README.md is made from it. An empty value means
the default.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, SettingsConfigDict

from app.errors import SettingsError

SECRETS = ("api_keys", "admin_key")
"""Fields that hold keys: never printed, and kept from the engine processes."""

LISTS = ("devices", "preload", "alias", "api_keys", "cors_origins")
"""Fields with several entries, comma separated: each may also be a flag of its own."""

LIVE = ("alias", "default_model", "log_level")
"""Fields that a reload takes from the file of CONFIG."""

_LINK = re.compile(r"[a-z]+://", re.IGNORECASE)
"""Kubernetes and Docker's links set INSTEP_PORT=tcp://10.96.12.7:8000 beside a service named instep."""


class _Environment(EnvSettingsSource):
    """The environment, less empty values and a port that is a platform's address of a service."""

    def __call__(self) -> dict[str, Any]:
        found = super().__call__().items()
        return {name: value for name, value in found if value.strip() and not (name == "port" and _LINK.match(value))}


def _file(settings_cls: type[BaseSettings], file: Path) -> InitSettingsSource:
    """The settings in a TOML file. Raises SettingsError: it cannot be read, or has a field that it may not have."""
    try:
        if file.is_fifo():
            raise OSError("a pipe, not a file")
        found = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"config: {file}: {getattr(error, 'strerror', '') or error}", param="config") from error
    for name in sorted(found.keys() - (settings_cls.model_fields.keys() - {*SECRETS, "config"})):
        shown = name if re.fullmatch("[a-z_]{1,64}", name) else "..."  # it may be a key
        raise SettingsError(f"config: {file}: {shown}: no setting of this file", param="config")
    return InitSettingsSource(settings_cls, found)


class Settings(BaseSettings):
    """All settings of a server."""

    model_config = SettingsConfigDict(env_prefix="INSTEP_", frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(cls, settings_cls: type[BaseSettings], *_: Any, **sources: Any) -> tuple[Any, ...]:
        """Arguments first, then the environment, then the file that one of them names."""
        first = sources["init_settings"], _Environment(settings_cls)
        file = next((found["config"] for found in (source() for source in first) if found.get("config")), "")
        return (*first, _file(settings_cls, Path(file).expanduser())) if file else first

    config: str = Field(
        "",
        description="TOML file with any of these settings but keys, as `max_wait = 60`; flags and variables go first. "
        "SIGHUP reads it again",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 listens on all")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to listen on; 0 picks a free one")
    models: Path = Field(Path("models"), description="Folder of cards: <folder>/<id>/card.toml")
    loras: str = Field(
        "",
        description="Folder of LoRAs, <folder>/<name>.safetensors; empty: the folder loras in MODELS, if there is one",
    )
    devices: str = Field("auto", description='One engine process for each entry: "cuda:0,cuda:1", "cpu,cpu", "auto"')
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="Number format of the networks")
    deterministic: bool = Field(
        False, description="Same request, same bits: pad every forward to the fixed size in the model's card"
    )
    preload: str = Field(
        "", description="Models to load at the start, comma separated; `all` is every model whose files are here"
    )
    default_model: str = Field(
        "",
        description="Model of a request that names none; empty: a model of yours (not one that comes with Instep) that "
        "takes prompts and whose files are all here, else emoji-mmdit",
    )
    alias: str = Field("", description="More names for models, comma separated: gpt-image-1=emoji-mmdit")
    device_memory: str = Field("80%", description='Memory of each device for weights: "40GB", or a share: "80%"')
    host_memory: str = Field("50%", description="Host memory for weights that do not fit on the GPU; the same forms")
    text_cache: str = Field(
        "256MB", description='Memory of each device for encoded prompts, which are not encoded again: "1GB"'
    )
    api_keys: str = Field("", repr=False, description="API keys that clients must send, comma separated: name=key")
    api_keys_file: str = Field("", description="TOML file of API keys with their weights and limits")
    admin_key: str = Field(
        "", repr=False, description="Key for the routes that load, unload and reload; empty: they are closed"
    )
    request_memory: ByteSize = Field(
        "1GB",
        validate_default=True,
        description='Memory for what accepted requests carry until they are answered, "512MB"; above it a 503',
    )
    upload_memory: ByteSize = Field(
        "256MB",
        validate_default=True,
        description="Room for all uploads that are here at once, on disk (in TMPDIR); above it a 503",
    )
    cors_origins: str = Field(
        "",
        description='Origins of web pages that may use this server, comma separated: "https://app.example"; "*" is all',
    )
    max_wait: Annotated[float, Field(gt=0)] = Field(
        120.0, description="Seconds of queue above which a request gets a 503"
    )
    request_timeout: Annotated[float, Field(gt=0, le=3600)] = Field(
        30.0,
        description="Seconds in which a client must send a whole request (its headers in 10), and must go on reading "
        "its answer",
    )
    max_connections: Annotated[int, Field(ge=0)] = Field(
        1000,
        description="Open connections above which the oldest silent one is closed for a new one; if none is silent, "
        "the new one gets a 503, unless it is a probe. 0 is as many as files may be open",
    )
    connections_per_address: Annotated[int, Field(ge=0)] = Field(
        0, description="The same for one address; keep 0 behind a proxy, which makes all clients one address"
    )
    drain: Annotated[float, Field(ge=0)] = Field(
        30.0, description="Seconds that running requests have to finish after SIGTERM"
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="CPU threads of an engine process; 0 is the cores that other processes leave free"
    )
    compile: bool = Field(
        False, description="Compile the networks' blocks once and keep them in CACHE; needs a C++ compiler"
    )
    cache: Path = Field(Path("~/.cache/instep"), description="Folder for measured profiles and compiled blocks")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged")

    @property
    def adapters(self) -> Path | None:
        """The folder of LoRAs, where there is one."""
        folder = Path(os.path.expanduser(self.loras)) if self.loras else self.models / "loras"
        return folder if self.loras or folder.is_dir() else None

    def without_secrets(self) -> Self:
        """The same less the keys: all that anyone but `app/keys.py` needs."""
        return self.model_copy(update=dict.fromkeys(SECRETS, ""))


def doubts(settings: Settings, flags: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Warnings about what was set and has no effect, where its user may have meant something else.

    flags: those of the command line by field. environment: as `os.environ` has it.
    """
    variables = {name.upper(): value for name, value in environment.items()}
    port, keys = variables.get("INSTEP_PORT", ""), variables.get("INSTEP_API_KEYS", "unset")
    found = []
    if _LINK.match(port) and not flags.get("port"):
        found.append(
            f"INSTEP_PORT={port} is ignored: a platform sets this beside a service named instep. "
            f"The port is {settings.port}; --port sets another."
        )
    if not settings.api_keys and not settings.api_keys_file and "" in (flags.get("api_keys"), keys.strip()):
        found.append("API_KEYS is set and empty: this server wants no key, so all who reach it may use it.")
    return found
