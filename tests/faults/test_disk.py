"""A disk that is full, read-only or full of rubbish, and few files: one clear line each, and serving goes on."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.soak import children
from tests.parts.servers import INSTEP, Process, free_port, generate, wait_ready
from tests.parts.waiting import eventually
from tests.parts.wires import connect

pytestmark = pytest.mark.slow

MODEL = "tiny-sd3-turbo"
SIZES = ("16x16", "16x32", "32x32", "32x64", "48x64", "64x64")
"""Their areas are far enough apart for a profile each."""
REQUESTS = 12
NOFILE = 64
WITHOUT_POWERS = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
"""Root may write everywhere, but not without this capability."""


def flags(models: Path, cache: Path, port: int = 0) -> list[str]:
    """One thread always: the name of a profile has their number, which a busy neighbour changes."""
    words = ["--models", models, "--cache", cache, "--port", port, "--devices", "cpu", "--preload", MODEL, "--drain", 5]
    return [*INSTEP, "serve", "--threads", "1", *map(str, words)]


def draw(url: str) -> None:
    """A dozen pictures of six sizes, each of which has a profile."""
    with httpx.Client(base_url=url, timeout=100) as http:
        for number in range(REQUESTS):
            body = {"model": MODEL, "prompt": "a red apple", "size": SIZES[number % len(SIZES)]}
            assert generate(http, body).status_code == 200


def warnings(server: Process) -> list[str]:
    """What the log says above info, which is all JSON."""
    lines = [json.loads(line) for line in server.lines]
    return [f"{line['event']} {line.get('reason', '')}" for line in lines if line["level"] not in ("info", "debug")]


def served(command: list[str], meanwhile: Callable[[Process], object] = lambda server: None) -> list[str]:
    """Serve a dozen pictures with this command. Returns the warnings; it must end well."""
    with Process(command) as server:
        server.wait_ready()
        meanwhile(server)
        draw(server.url)
        server.stop()
        return warnings(server)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A file system in memory without room. Where it may not be mounted, /dev/full cannot stand in for a folder."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        with pytest.raises(OSError, match="No space left"), (folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def limited(files: int) -> list[str]:
    """A prefix for a command that may have so many open files."""
    sets = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))"
    return [sys.executable, "-c", f"import os, resource, sys; {sets}; os.execv(sys.argv[1], sys.argv[1:])"]


def write_nothing(server: Process) -> None:
    """Let no file of the engine process grow from now on."""
    (engine,) = children(server.process.pid)
    resource.prlimit(engine, resource.RLIMIT_FSIZE, (0, 0))


def test_a_full_disk_under_the_cache(tiny: Path, tmp_path: Path) -> None:
    with full_disk(tmp_path / "cache"):
        (line,) = served(flags(tiny, tmp_path / "cache"))
        assert "No space left on device" in line and "cannot be written" in line and str(tmp_path / "cache") in line
        assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["filling"]


def test_files_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    """Without root, by a limit: what a write then says is another word, and the same line."""
    (line,) = served(flags(tiny, tmp_path), write_nothing)
    assert "File too large" in line and "cannot be written" in line
    (profile,) = (file for file in tmp_path.rglob("*") if file.is_file())  # of the size that the start measures
    assert json.loads(profile.read_text())


def test_a_cache_that_is_read_only(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    (line,) = served([*(WITHOUT_POWERS if os.getuid() == 0 else ()), *flags(tiny, cache)])
    assert "Permission denied" in line and "cannot be written" in line
    assert list(cache.iterdir()) == []


RUBBISH: tuple[Callable[[Path], Any], ...] = (
    lambda file: file.write_bytes(b"[" * 60_000),
    lambda file: file.write_bytes(b"\xff" * 200_000),
    lambda file: file.write_text('{"1": NaN, "2": -1}'),
    lambda file: os.mkfifo(file),
    lambda file: file.symlink_to(file),
    lambda file: (file.mkdir(), (file / "more").touch()),
)


def test_a_cache_full_of_rubbish(tiny: Path, tmp_path: Path) -> None:
    """Each kind in the place of a profile: one line for all that is read, one for the folder in the way."""
    assert served(flags(tiny, tmp_path)) == []
    profiles = sorted((tmp_path / "profiles").iterdir())
    assert len(profiles) == len(SIZES) == len(RUBBISH)
    for spoil, file in zip(RUBBISH, profiles, strict=True):
        file.unlink()
        spoil(file)
    lines = served(flags(tiny, tmp_path))
    assert len(lines) == 2, lines
    read, written = lines
    assert " cannot be read " in read and " cannot be written (Is a directory)" in written
    assert all(json.loads(file.read_text()) for file in profiles[:-1])


def test_a_file_where_the_cache_should_be(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    (line,) = served(flags(tiny, tmp_path / "cache"))
    assert "Not a directory" in line and "cannot be written" in line


def test_a_full_disk_under_the_log(tiny: Path, tmp_path: Path) -> None:
    """There is no line then; requests are answered, and an engine that dies comes back."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(flags(tiny, tmp_path, port), stdout=full, stderr=full)
    try:
        wait_ready(url, alive=lambda: process.poll() is None)
        draw(url)
        (engine,) = children(process.pid)
        os.kill(engine, signal.SIGKILL)
        eventually(lambda: children(process.pid) not in ([], [engine]), 100)
        wait_ready(url)
        draw(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_64_files_hold_a_crowd_and_a_restart(tiny: Path, tmp_path: Path) -> None:
    """More connections than files, silent ones and requests, and meanwhile the engine process dies and comes back."""

    def crowd(server: Process) -> None:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (NOFILE, NOFILE)
        (engine,) = children(server.process.pid)
        with ExitStack() as stack:
            for _ in range(4 * NOFILE):
                stack.enter_context(connect(server.url))
            os.kill(engine, signal.SIGKILL)
            eventually(lambda: children(server.process.pid) not in ([], [engine]), 100)
            server.wait_ready()
            draw(server.url)

    lines = served([*limited(NOFILE), *flags(tiny, tmp_path)], crowd)
    assert [line for line in lines if "engine process" not in line] == ["fewer connections "]
    assert len(lines) == 2, "one line for the files and one for the death"
