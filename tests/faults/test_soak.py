"""A short soak: the function that judges an hour calls a server flat, and the same one with a planted leak not.

In float32: in bfloat16 oneDNN keeps megabytes of kernels for each width that is new.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.faults.soak import Facts, Traffic, judge, soak
from tests.parts.servers import Served
from tests.parts.workers import faulty

pytestmark = pytest.mark.slow

MODELS = ("tiny-sd3-turbo", "tiny-sd3", "tiny-dit")
SAMPLES, SECONDS, RATE = 12, 1.0, 40.0
MOST = 6.0
"""MB from one sample to the next: ten times what a sound server still grows by, a fifth of what the leak takes."""


@pytest.mark.parametrize(("command", "engine"), [(WORKER, "flat"), (faulty("leak"), "leak")], ids=["sound", "leaky"])
def test_a_leak_of_the_engine_is_seen_and_nothing_else(tiny: Path, tmp_path: Path, command, engine: str) -> None:
    settings = Settings(models=tiny, devices="cpu", dtype="float32", port=0, preload=",".join(MODELS), cache=tmp_path)
    with Served(settings, command) as server:
        server.wait_ready()
        found = soak(server.process.pid, Traffic(server.url, MODELS, RATE, leave=0.02), SAMPLES, SECONDS, MOST)
        server.stop()
    outcomes = found["outcomes"]
    assert outcomes.keys() == {"answered", "left"} and outcomes["left"] > 0.02 * outcomes["answered"]
    assert (found["front"]["verdict"], found["engine"]["verdict"]) == ("flat", engine), found


def test_descriptors_and_threads_that_grow_are_a_leak() -> None:
    def growing(descriptors: int = 0, threads: int = 0) -> str:
        return str(judge([Facts(100.0, 20 + descriptors * i, 8 + threads * i) for i in range(16)])["verdict"])

    assert [growing(), growing(descriptors=1), growing(threads=1)] == ["flat", "leak", "leak"]
