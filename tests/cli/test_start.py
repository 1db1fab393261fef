"""What a start ends with: the address and a curl that works as it stands, for a person and for a collector of logs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.parts.cards import write_cards
from tests.parts.servers import Process
from tests.parts.waiting import eventually
from tests.parts.workers import FAKE

KEY = "sk-0123456789abcdef"


CONSOLE = (str(Path(sys.executable).with_name("instep")), "serve")
QUICK = """
import sys
from functools import partial
from app import main
main.Supervisor = partial(main.Supervisor, command=sys.argv[1].split())
from app.cli.commands import app
app(["serve", *sys.argv[2:]])
"""
FAKED = (sys.executable, "-c", QUICK, " ".join(FAKE))
"""`instep serve` with the fake worker, which starts at once."""


@contextmanager
def started(command: tuple[str, ...], terminal: bool, *flags: str, **environment: str) -> Iterator[Process]:
    words = (*command, "--port", "0", "--devices", "cpu", *flags)
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    with Process(words, terminal=terminal, **environment) as start:
        yield start
        start.stop()


def lines(start: Process) -> list[str]:
    """The lines of a start, once it has said where it listens and has been silent for a second."""
    eventually(lambda: "picture.png" in start.words or start.process.poll() is not None, 100, lambda: start.words)
    length = -1
    while length != len(start.words):
        length = len(start.words)
        time.sleep(1)
    return start.words.splitlines()


def pasted(curl: str, folder: Path, **environment: str) -> tuple[int, int]:
    """Run the line in a shell; the size of the picture that it wrote."""
    direct = {"no_proxy": "127.0.0.1,::1", "NO_PROXY": "127.0.0.1,::1"}
    done = subprocess.run(
        ["sh", "-c", curl], cwd=folder, env={**os.environ, **direct, **environment}, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "picture.png") as picture:
        assert picture.format == "PNG"
        return picture.size


@pytest.mark.slow
def test_a_terminal_ends_with_the_address_and_a_curl_that_works(tiny: Path, cache: Path, tmp_path: Path) -> None:
    """The real console script and a real model; and however little is logged."""
    flags = ("--models", str(tiny), "--cache", str(cache), "--default-model", "tiny-sd3", "--log-level", "error")
    with started(CONSOLE, True, *flags) as start:
        words, curl, where = lines(start)[-3:]
        (url,) = re.findall(r"^Instep draws at (http://127\.0\.0\.1:\d+)$", where)
        assert words == "A first picture:"
        assert curl.startswith(f"curl {url}/v1/images/generations ")
        assert pasted(curl, tmp_path) == (32, 32)


def test_a_collector_gets_one_json_line_of_the_same(tmp_path: Path) -> None:
    """Here for a model of classes, on all addresses, with keys: none of them is printed."""
    models = write_cards(tmp_path / "models")
    flags = ("--models", str(models), "--default-model", "tiny-label", "--host", "0.0.0.0")
    with started(FAKED, False, *flags, INSTEP_API_KEYS=KEY) as start:
        last = [json.loads(line) for line in lines(start)][-1]
        assert (last["event"], last["level"]) == ("listening", "info")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", last["url"]) and last["address"].startswith("0.0.0.0:")
        assert KEY not in start.words and "$INSTEP_KEY" in last["curl"]
        assert pasted(last["curl"], tmp_path, INSTEP_KEY=KEY) == (32, 32)


@pytest.mark.slow
def test_a_terminal_is_told_that_keys_are_wanted(tmp_path: Path) -> None:
    models = write_cards(tmp_path / "models")
    flags = ("--models", str(models), "--default-model", "tiny-text", "--host", "::1")
    with started(FAKED, True, *flags, INSTEP_API_KEYS=f"alice={KEY}") as start:
        words, curl, where = lines(start)[-3:]
        assert re.fullmatch(r"Instep draws at http://\[::1\]:\d+", where)
        assert words == "A first picture, with one of your keys in INSTEP_KEY:"
        assert KEY not in start.words
        assert pasted(curl, tmp_path, INSTEP_KEY=KEY) == (32, 32)
