"""Settings: one flat frozen class. A field is an environment variable INSTEP_<NAME> and a flag of `instep serve`.

The description of a field is its documentation; the README's table is made from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

SECRETS = ("api_keys", "admin_key")
"""Fields that hold keys: never printed, and kept from the engine processes."""


class Settings(BaseSettings):
    """Everything a server can be told at start."""

    model_config = SettingsConfigDict(env_prefix="INSTEP_", frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to listen on; 0 picks a free one")
    models: Path = Field(Path("models"), description="Folder of cards: <folder>/<id>/card.toml")
    devices: str = Field("auto", description='One engine process for each entry: "cuda:0,cuda:1", "cpu,cpu", "auto"')
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="Number format of the networks")
    deterministic: bool = Field(False, description="Same request, same bits: pads every forward to the card's bucket")
    preload: str = Field(
        "", description="Model ids to load at start, comma separated; `all` for every one that is here"
    )
    default_model: str = Field(
        "", description="The model of a request that names none; empty: the first with files beside it"
    )
    device_memory: str = Field("80%", description='Memory of a device that weights may take: "40GB", or a share "80%"')
    host_memory: str = Field("50%", description="Host memory for weights that a GPU has no room for; the same forms")
    text_cache: str = Field(
        "256MB", description='Memory of a device for encoded prompts, so that none is encoded again: bytes, "1GB"'
    )
    api_keys: str = Field("", repr=False, description="Keys that clients must send, comma separated: name=key")
    api_keys_file: str = Field("", description="TOML file of keys with their weights and limits")
    admin_key: str = Field("", repr=False, description="Key of the load and unload routes; empty: closed to all")
    max_wait: Annotated[float, Field(gt=0)] = Field(
        120.0, description="Seconds of queue above which a request gets 503"
    )
    request_timeout: Annotated[float, Field(gt=0, le=3600)] = Field(
        30.0, description="Seconds that a client may take to send one whole request, or to go on reading its answer"
    )
    max_connections: Annotated[int, Field(ge=0)] = Field(
        1000, description="Open connections above which new ones get 503, probes excepted; 0 for no cap"
    )
    connections_per_address: Annotated[int, Field(ge=0)] = Field(
        0, description="The same for one address; leave it at 0 behind a proxy, whose address is every client's"
    )
    drain: Annotated[float, Field(ge=0)] = Field(
        30.0, description="Seconds that running requests may take after SIGTERM"
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads an engine process; 0 shares the cores")
    compile: bool = Field(False, description="Compile the networks' blocks, once, into CACHE; needs a C++ compiler")
    cache: Path = Field(Path("~/.cache/instep"), description="Folder for measured profiles and compiled blocks")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged")

    def without_secrets(self) -> Settings:
        """The same less the keys: all that anyone but `app/keys.py` needs."""
        return self.model_copy(update=dict.fromkeys(SECRETS, ""))
