"""Workers of one or two lines, for what the fake worker does not do: lie, refuse, end, never stop.

They import nothing of ours, so they start at once; what they say was pickled here.
"""

from __future__ import annotations

import sys

from app.errors import SettingsError
from app.worker import wire

HEAD = "import os, socket, sys, time\nsay = socket.socket(fileno=int(sys.argv[1])).sendall\n"
HELLO = wire.pack(wire.Hello(1))
REFUSAL = wire.pack(wire.Refusal(SettingsError("no such GPU")))


def script(body: str) -> tuple[str, ...]:
    """The command of a worker that runs these lines, in which `say(bytes)` sends."""
    return (sys.executable, "-S", "-c", HEAD + body)
