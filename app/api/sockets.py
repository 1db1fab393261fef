"""Sockets: the one that listens, and room for the connections that it accepts."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import sys
import time
from typing import Any

from app import logs
from app.errors import SettingsError

WAITING = 2048
"""Connections that the system keeps for us until we accept them."""

ACCEPTED = 4
"""Connections accepted in one turn of the event loop: each has a file before the door has counted it."""

OTHER_FILES = 256
"""Open files besides the connections within the caps; half of all where there are fewer than twice as many."""

MOST_FILES = 1 << 20
"""Open files that are enough where connections have no cap, and the system has none either."""

NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Why a connection cannot be accepted though it is there. asyncio tries again after a second."""

QUIET = 60.0
"""Seconds between two lines of the log about that."""


def make_room(connections: int) -> int:
    """Raise this process's limit of open files for so many connections, 0 for all that there can be.

    Returns how many connections fit, and logs a warning where that is fewer.
    """
    soft, hard = (
        sys.maxsize if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    files = max(soft, min(hard, connections + OTHER_FILES if connections else MOST_FILES))
    if files > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard if hard < sys.maxsize else resource.RLIM_INFINITY))
    room = files - min(OTHER_FILES, files // 2)
    if room < connections:
        logs.logger("instep").warning("fewer connections", wanted=connections, room=room, open_files=files)
    return min(room, connections or room)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises SettingsError naming what is taken, before anything heavy has started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # NOTE: with the protocol named asyncio switches Nagle off; else every answer after the first waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise taken(host, port, error) from error
    listener.set_inheritable(False)
    return listener


def taken(host: str, port: int, error: OSError) -> SettingsError:
    """The error for an address that the system does not give us."""
    return SettingsError(f"cannot listen on {host}, port {port}: {error.strerror or error}", param="port")


class Failures:
    """An exception handler for the event loop: connections that could not be accepted are one line a minute."""

    def __init__(self) -> None:
        self._said = -QUIET
        self._count = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in NO_FILES or "socket" not in context:
            loop.default_exception_handler(context)
            return
        self._count += 1
        if (now := time.monotonic()) >= self._said + QUIET:
            logs.logger("instep").error("connections wait for open files", reason=error.strerror, failures=self._count)
            self._said, self._count = now, 0
