"""Commands of workers for tests: the fake one, the real one with a fault, and scripts of one or two lines.

Scripts import nothing of ours, so they start at once; what they say was pickled here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from app.errors import SettingsError
from app.worker import wire

FAKE = (sys.executable, "-P", str(Path(__file__).with_name("fake_worker.py")))
SURVEY = (sys.executable, "-P", str(Path(__file__).with_name("fake_survey.py")))
"""The survey of LoRAs without torch."""
_FAULTY = (sys.executable, "-P", str(Path(__file__).with_name("faulty_worker.py")))
"""-P: a module beside a worker must not take the place of an installed one of its name."""
_HEAD = "import os, socket, sys, time\nsay = socket.socket(fileno=int(sys.argv[1])).sendall\n"
HELLO = wire.pack(wire.Hello())
REFUSAL = wire.pack(wire.Hello(SettingsError("no such GPU")))


def faulty(fault: str) -> tuple[str, ...]:
    """The real worker with one of the faults of `tests/parts/faulty_worker.py`."""
    return (*_FAULTY, fault)


def script(body: str) -> tuple[str, ...]:
    """A worker that runs these lines, in which `say(bytes)` sends."""
    return (sys.executable, "-S", "-c", _HEAD + body)
