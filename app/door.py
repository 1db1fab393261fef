"""Door: which connections of one server are let in, and how one is refused before there is a route.

Plain counting, without sockets: `app/protocol.py` is the connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from app.errors import InstepError
from app.settings import Settings

SPARE = 64
SPARE_EACH = 8
"""Connections over the caps that are heard at all, of all addresses and of one. Further ones are dropped
without a word."""

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body of a refusal."""


class Asked(NamedTuple):
    """What the answer to a request depends on before there is a route: its method and its Origin header."""

    method: bytes = b""
    origin: bytes = b""


NOTHING = Asked()
"""No request has come yet, or not the whole head of one."""


class Door:
    """What the connections of one server share: the settings, how a refusal is answered, and who is there."""

    def __init__(self, settings: Settings, refuse: Callable[[InstepError, Asked], Answer]) -> None:
        self.seconds = settings.request_timeout
        self.refuse = refuse
        self._caps = (settings.max_connections, settings.connections_per_address)
        self._inside: Counter[str] = Counter()
        self._over: Counter[str] = Counter()

    def enter(self, address: str) -> bool | None:
        """Whether a new connection is within the caps; None where it is not to be heard at all."""
        pairs = zip(self._caps, (self._inside.total(), self._inside[address]), strict=True)
        if all(now < most for most, now in pairs if most):
            self._inside[address] += 1
            return True
        self._over[address] += 1
        return False if self._over.total() <= SPARE and self._over[address] <= SPARE_EACH else None

    def leave(self, address: str, entered: bool | None) -> None:
        """The connection is gone. entered: what `enter` said of it."""
        counts = self._inside if entered else self._over
        counts[address] -= 1
        if not counts[address]:
            del counts[address]
