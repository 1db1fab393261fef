"""Curl: the shell command that asks a server for a picture, to be pasted as it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.cards.card import Card
from app.imaging import Format
from app.jobs.body_schema import example

_KEY = '-H "Authorization: Bearer $INSTEP_KEY"'
"""Outside of quotes that would keep the shell from putting the key in: no key is ever printed."""


def curl(
    server: str, route: str, body: Mapping[str, Any], format: Format, out: Path | str, *, key: bool = False
) -> str:
    """The command that posts this body to /v1/<route> of a server and writes the file alone.

    server: its URL or host and port. key: whether it wants one, which the command takes from INSTEP_KEY.
    """
    asked = shlex.join(["-H", "Content-Type: application/json", "-H", f"Accept: image/{format}"])
    posted = shlex.join(["-d", json.dumps(body, ensure_ascii=False), "-o", str(out)])
    return " ".join([f"curl {shlex.quote(f'{server}/v1/{route}')}", *([_KEY] if key else []), asked, posted])


def first_curl(server: str, card: Card, *, key: bool) -> str:
    """The command for a first picture by this card, with nothing but what it needs."""
    body = {name: value for name, value in example(card).items() if name in ("model", "prompt", "class_label")}
    return curl(server, "images/generations", body, "png", "picture.png", key=key)


def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches what listens there; what listens on all addresses, on its own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
