"""Door: which connections of one server are let in, and how one is refused before there is a route.

Plain counting, without sockets: `app/api/protocol.py` is the connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from app.errors import InstepError
from app.settings import Settings

SPARE = 64
SPARE_EACH = 8
"""Connections over the caps that are heard at all, of all addresses and of one. Further ones are dropped
without a word. A server with a small cap has fewer spare ones, an eighth of the cap."""

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body of a refusal."""


class Asked(NamedTuple):
    """What the answer to a request depends on before there is a route: its method and its Origin header."""

    method: bytes = b""
    origin: bytes = b""


NOTHING = Asked()
"""No request has come yet, or not the whole head of one."""


class Guest(Protocol):
    """One connection, as the door knows it."""

    address: str

    def dismiss(self) -> bool:
        """Close this connection, which is silent: another one needs its place. False where it is not silent after all:
        its next bytes are here and only not read yet."""


class Door:
    """What the connections of one server share: the settings, how a refusal is answered, and who is there."""

    def __init__(self, settings: Settings, refuse: Callable[[InstepError, Asked], Answer]) -> None:
        self.seconds = settings.request_timeout
        self.refuse = refuse
        self._most, self._most_each = settings.max_connections, settings.connections_per_address
        self._guests: dict[Guest, bool] = {}
        self._inside: Counter[str] = Counter()
        self._over: Counter[str] = Counter()
        self._silent: dict[str, dict[Guest, None]] = {}

    def enter(self, guest: Guest) -> bool | None:
        """Whether a new connection is within the caps; None where it is not to be heard at all.

        At a cap the oldest silent connection that agrees to be dismissed makes room for it.
        """
        address = guest.address
        if self._full(address) and (gone := next((old for old in self._silent_for(address) if old.dismiss()), None)):
            self.leave(gone)
        if not self._full(address):
            self._count(guest, True)
            self.note(guest, silent=True)
            return True
        spare = min(SPARE, self._most // 8 + 1) if self._most else SPARE
        if self._over.total() >= spare or self._over[address] >= SPARE_EACH:
            return None
        self._count(guest, False)
        return False

    def note(self, guest: Guest, *, silent: bool) -> None:
        """A connection within the caps is silent while there is no whole head of a request to answer."""
        if not self._guests.get(guest):
            return
        crowd = self._silent.setdefault(guest.address, {})
        if silent:
            crowd.setdefault(guest)
        else:
            crowd.pop(guest, None)
        if not crowd:
            del self._silent[guest.address]

    def leave(self, guest: Guest) -> None:
        """The connection is gone, or has been told to go."""
        self.note(guest, silent=False)
        if (within := self._guests.pop(guest, None)) is None:
            return
        counts = self._inside if within else self._over
        counts[guest.address] -= 1
        if not counts[guest.address]:
            del counts[guest.address]

    def _count(self, guest: Guest, within: bool) -> None:
        self._guests[guest] = within
        (self._inside if within else self._over)[guest.address] += 1

    def _full(self, address: str) -> bool:
        return self._full_of(address) or 0 < self._most <= self._inside.total()

    def _full_of(self, address: str) -> bool:
        return 0 < self._most_each <= self._inside[address]

    def _silent_for(self, address: str) -> Iterable[Guest]:
        """Silent connections, the oldest first: of this address where that is at its own cap, else of the address that
        has most of them, so that a crowd pushes out its own."""
        crowds = self._silent
        return (crowds.get(address) if self._full_of(address) else max(crowds.values(), key=len, default=None)) or ()
