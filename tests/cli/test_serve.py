"""`instep serve`: every setting is a flag, a bad one is one line, and a real server starts, answers and drains."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from app import main
from app.cli.options import read_settings
from app.errors import SettingsError
from app.settings import Settings
from tests.parts.commands import Run, one_line
from tests.parts.servers import INSTEP, Process

OTHER = {
    "host": "0.0.0.0", "port": "0", "models": "elsewhere", "devices": "cpu,cpu", "dtype": "bfloat16", "preload": "all",
    "default_model": "a", "max_wait": "1.5", "drain": "2.5", "threads": "3", "cache": "profiles", "log_level": "debug",
    "device_memory": "3GB", "host_memory": "25%", "api_keys": "alice=0123456789abcdef", "api_keys_file": "keys.toml",
    "admin_key": "fedcba9876543210", "request_timeout": "12.5", "max_connections": "20", "connections_per_address": "5",
    "text_cache": "64MB", "alias": "dall-e-3=tiny-sd3,lab/tiny=tiny-dit",
    "config": "/dev/null", "loras": "adapters",
    "cors_origins": "https://app.example", "request_memory": "2GB", "upload_memory": "1GB",
}  # fmt: skip
"""For each setting that is not a switch a value that is not its default."""


SECRET = "sk-0123456789abcdef"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `main.serve` is called with, instead of serving."""
    calls: list[Settings] = []
    monkeypatch.setattr(main, "serve", lambda settings, *, reread: calls.append(settings))
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
        (("--port", "x"), "--port (INSTEP_PORT): Input should be a valid integer"),
        (("--port", "tcp://10.96.12.7:8000"), "--port (INSTEP_PORT): Input should be a valid integer"),
        (("--dtype", "int8"), "--dtype (INSTEP_DTYPE): Input should be 'auto', 'bfloat16' or 'float32'"),
        (("--max-wait", "nan"), "--max-wait (INSTEP_MAX_WAIT): Input should be greater than 0"),
        (("--no-such-flag",), "No such option"),
        (("--models", "nowhere"), "no cards in nowhere"),
        (("--default-model", "x"), 'no card is named "x"'),
        (("--loras", "nowhere"), "loras: there is no folder nowhere"),
        (("--loras", "~nobody-here/a"), "loras: there is no folder ~nobody-here/a"),
        (("--alias", "a=tiny-sd3", "--alias", "a=tiny-dit"), 'alias: "a" is a name of tiny-sd3 already'),
    ],
)
def test_a_bad_setting_is_one_line(run: Run, words: tuple[str, ...], said: str) -> None:
    assert said in one_line(run("serve", *words))


@pytest.mark.parametrize("empty", ["", "  "])
def test_what_is_empty_is_the_default(
    run: Run, served: list[Settings], monkeypatch: pytest.MonkeyPatch, empty: str
) -> None:
    """As compose files, Helm charts and scripts leave it: INSTEP_HOST= is not "listen on every address"."""
    for name in Settings.model_fields:
        monkeypatch.setenv(f"INSTEP_{name.upper()}", empty)
    flags = [word for name in OTHER for word in (f"--{name.replace('_', '-')}", empty)]
    assert run("serve").exit_code == run("serve", *flags).exit_code == 0
    defaults = {name: field.default for name, field in Settings.model_fields.items()} | {
        "request_memory": 10**9,
        "upload_memory": 256 * 10**6,
    }
    assert [settings.model_dump() for settings in served] == [defaults, defaults]


@pytest.mark.parametrize("words", [("models", "list"), ("demo",), ("generate", "a"), ("bench", "step")])
def test_an_empty_folder_of_cards_is_the_default_of_every_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """And not this folder."""
    monkeypatch.delenv("INSTEP_MODELS")
    assert one_line(run(*words, "--models", "")).startswith("no cards in models:")


def test_a_list_may_come_as_several_flags(run: Run, served: list[Settings]) -> None:
    run("serve", "--preload", "a", "--preload", "b,c", "--alias", "x=tiny-sd3", "--alias", "y=tiny-dit")
    assert [(settings.preload, settings.alias) for settings in served] == [("a,b,c", "x=tiny-sd3,y=tiny-dit")]


LINKS = {
    "INSTEP_PORT": "tcp://10.96.12.7:8000", "INSTEP_SERVICE_HOST": "10.96.12.7", "INSTEP_SERVICE_PORT": "8000",
    "INSTEP_SERVICE_PORT_HTTP": "8000", "INSTEP_PORT_8000_TCP": "tcp://10.96.12.7:8000",
    "INSTEP_PORT_8000_TCP_PROTO": "tcp", "INSTEP_PORT_8000_TCP_PORT": "8000", "INSTEP_PORT_8000_TCP_ADDR": "10.96.12.7",
}  # fmt: skip
"""What Kubernetes sets in every pod beside a Service named instep."""


def warned(output: str) -> list[str]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line["event"] for line in lines if line["level"] == "warning"]


def test_the_address_of_a_service_is_no_port(run: Run, served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    (told,) = warned(run("serve").stderr)
    assert "INSTEP_PORT=tcp://10.96.12.7:8000 is ignored" in told and "8000" in told
    assert warned(run("serve", "--port", "9000").stderr) == []
    monkeypatch.setenv("INSTEP_PORT", "udp://10.96.12.7:53")
    assert len(warned(run("serve").stderr)) == 1
    assert [settings.port for settings in served] == [8000, 9000, 8000]


def test_keys_that_are_set_and_empty_are_a_warning(
    run: Run, served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert warned(run("serve").stderr) == []
    (by_flag,) = warned(run("serve", "--api-keys", "").stderr)
    monkeypatch.setenv("INSTEP_API_KEYS", "")
    (by_variable,) = warned(run("serve").stderr)
    assert by_flag == by_variable and "wants no key" in by_flag
    assert warned(run("serve", "--api-keys", OTHER["api_keys"]).stderr) == []
    assert warned(run("serve", "--api-keys-file", "keys.toml").stderr) == []
    assert len(served) == 5


@pytest.mark.slow
def test_no_variable_of_the_hub_is_empty() -> None:
    """HF_HOME= would put the cache here, HF_ENDPOINT= would ask nobody: huggingface_hub takes "" for a value."""
    names = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    code = "from app.checkpoints.hub import constants as c\n"
    code += "print(c.ENDPOINT, c.HF_HUB_CACHE, c.HF_TOKEN_PATH, c.HF_HOME)"

    def told(**more: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in names}
        words = [sys.executable, "-c", code]
        return subprocess.run(words, env=kept | more, capture_output=True, text=True, timeout=60, check=True).stdout

    assert told(**dict.fromkeys(names, "")) == told()
    assert told(HF_ENDPOINT="http://127.0.0.1:9").startswith("http://127.0.0.1:9 ")


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


@pytest.mark.slow
def test_a_server_starts_answers_and_ends_on_sigterm(tiny: Path, cache: Path) -> None:
    flags = ("--port", "0", "--devices", "cpu", "--models", str(tiny), "--cache", str(cache), "--drain", "5")
    with Process((*INSTEP, "serve", *flags), CI="1") as server:
        with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
            assert b"tiny-sd3" in answer.read()
        server.stop()
        assert "Traceback" not in server.words
