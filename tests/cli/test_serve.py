"""`instep serve`: every setting is a flag, a bad one is one line, and a real server starts, answers and drains."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from app import main
from app.cli.serve import read_settings
from app.errors import SettingsError
from app.settings import Settings
from tests.cli.conftest import Run, one_line

OTHER = {
    "host": "0.0.0.0", "port": "0", "models": "elsewhere", "devices": "cpu,cpu", "dtype": "bfloat16", "preload": "all",
    "default_model": "a", "max_wait": "1.5", "drain": "2.5", "threads": "3", "cache": "profiles", "log_level": "debug",
    "device_memory": "3GB", "host_memory": "25%", "api_keys": "alice=0123456789abcdef", "api_keys_file": "keys.toml",
    "admin_key": "fedcba9876543210", "request_timeout": "12.5", "max_connections": "20", "connections_per_address": "5",
    "text_cache": "64MB",
}  # fmt: skip
"""For each setting that is not a switch a value that is not its default."""


SECRET = "sk-0123456789abcdef"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `main.serve` is called with, instead of serving."""
    calls: list[Settings] = []
    monkeypatch.setattr(main, "serve", calls.append)
    return calls


def test_every_setting_is_a_flag(run: Run, served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    switches = [name for name, field in Settings.model_fields.items() if field.annotation is bool]
    assert {*OTHER, *switches} == set(Settings.model_fields)
    flags = [word for name, value in OTHER.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("serve", *flags, *(f"--{name}" for name in switches)).exit_code == 0
    for name in OTHER:
        monkeypatch.setenv(f"INSTEP_{name.upper()}", OTHER[name])
    for name in switches:
        monkeypatch.setenv(f"INSTEP_{name.upper()}", "true")
    assert served == [Settings()]


def test_a_flag_wins_over_the_environment(run: Run, served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_PORT", "7000")
    monkeypatch.setenv("INSTEP_DETERMINISTIC", "true")
    run("serve")
    run("serve", "--port", "7001", "--no-deterministic")
    assert [(settings.port, settings.deterministic) for settings in served] == [(7000, True), (7001, False)]


def test_help_says_what_each_setting_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = run("serve", "--help").output
    for name, field in Settings.model_fields.items():
        assert re.search(rf"--{name.replace('_', '-')}\b.*{re.escape(str(field.description)[:40])}", text), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--port", "70000"), "--port (INSTEP_PORT): Input should be less than or equal to 65535"),
        (("--port", "x"), "Invalid value for '--port'"),
        (("--dtype", "int8"), "Invalid value for '--dtype'"),
        (("--max-wait", "nan"), "--max-wait (INSTEP_MAX_WAIT): Input should be greater than 0"),
        (("--no-such-flag",), "No such option"),
        (("--models", "nowhere"), "no cards in nowhere"),
        (("--default-model", "x"), 'no card is named "x"'),
    ],
)
def test_a_bad_setting_is_one_line(run: Run, words: tuple[str, ...], said: str) -> None:
    assert said in one_line(run("serve", *words))


def test_a_bad_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_DRAIN", "soon")
    with pytest.raises(SettingsError, match="INSTEP_DRAIN"):
        read_settings()


def test_a_port_in_use_is_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: Address already in use" in one_line(run("serve", "--port", port))


def test_no_key_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_LOG_LEVEL", "debug")
    monkeypatch.setenv("INSTEP_API_KEYS", f"alice={SECRET}")
    monkeypatch.setenv("INSTEP_ADMIN_KEY", SECRET)
    assert SECRET not in run("serve", "--help").output
    assert one_line(run("serve")) == "api_keys: entry 1: the same key as that of admin"
    said = one_line(run("serve", "--admin-key", f"{SECRET} {SECRET}"))
    assert said.startswith("admin_key: ") and SECRET not in said


def test_a_device_that_is_not_there_is_one_line(run: Run) -> None:
    assert "toaster" in one_line(run("serve", "--port", 0, "--devices", "toaster"))


def test_a_server_starts_answers_and_ends_on_sigterm(tiny: Path, cache: Path) -> None:
    words = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0", "--devices", "cpu"]
    words += ["--models", str(tiny), "--cache", str(cache), "--drain", "5"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "CI": "1"})
    try:
        url = wait_for_url(server)
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            assert b"tiny-sd3" in answer.read()
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate(timeout=30)
        assert server.returncode == 0
        assert b"Traceback" not in rest
    finally:
        server.kill()
        server.wait()


def wait_for_url(server: subprocess.Popen[bytes]) -> str:
    """The address in the first line that names one."""
    assert server.stdout is not None
    selector, seen, until = selectors.DefaultSelector(), b"", time.monotonic() + 60
    selector.register(server.stdout, selectors.EVENT_READ)
    while time.monotonic() < until and selector.select(timeout=60):
        chunk = os.read(server.stdout.fileno(), 65536)
        seen += chunk
        found = re.search(rb"http://127\.0\.0\.1:\d+", seen)
        if found:
            return found[0].decode()
        if not chunk:
            break
    raise AssertionError(f"no address in: {seen.decode(errors='replace')}")
