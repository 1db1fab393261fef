"""`serve` as a process of its own, with a fake worker: start, drain, signals, and what cannot start."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import main
from app.errors import SettingsError
from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import Clients, Served, refuses
from tests.parts.waiting import eventually
from tests.parts.workers import FAKE

REFUSES = """
import socket, sys
from app.errors import SettingsError
from app.worker import wire
stream = socket.socket(fileno=int(sys.argv[1])).makefile("rwb")
wire.receive(stream)
wire.send(stream, wire.Hello(SettingsError("no such device")))
"""
LATE = """
import os, runpy, sys, time
from pathlib import Path
go = Path(sys.argv.pop(1))
waits = go.with_suffix(".part")
waits.write_text(str(os.getpid()))
waits.rename(go.with_suffix(".waits"))
while not go.exists():
    time.sleep(0.01)
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(models=write_cards(tmp_path / "models"), devices="cpu", preload="all", port=0, drain=20)


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    with Served(settings) as served:
        yield served


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_generating_drains_and_exits_0(served: Served, number: int) -> None:
    url = served.logged("listening")["url"]
    clients = Clients(url, "!slow 3")
    served.process.send_signal(number)
    eventually(lambda: refuses(str(url)))
    whole, stream = clients.answers()
    assert (whole.status_code, stream.status_code) == (200, 200)
    assert "image_generation.completed" in stream.text
    assert served.ended() == (0, "returned\n")
    assert all(isinstance(json.loads(line), dict) for line in served.lines)
    assert "Traceback" not in "".join(served.lines)


@pytest.mark.slow
def test_what_outlives_the_drain_is_told_so(settings: Settings) -> None:
    with Served(settings.model_copy(update={"drain": 0.5})) as served:
        url = served.logged("listening")["url"]
        clients = Clients(url, "!slow 60")
        served.process.send_signal(signal.SIGTERM)
        whole, stream = clients.answers()
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in whole.headers
        assert '"code":"shutting_down"' in stream.text
        assert served.ended() == (0, "returned\n")


@pytest.mark.slow
def test_a_worker_that_refuses_is_one_line(settings: Settings, tmp_path: Path) -> None:
    script = tmp_path / "refuses.py"
    script.write_text(REFUSES, encoding="utf-8")
    served = Served(settings, (sys.executable, str(script)))
    code, _ = served.ended()
    assert code == 1
    assert served.lines[-1] == "refused: no such device\n"
    assert "Traceback" not in "".join(served.lines)


@pytest.mark.slow
def test_of_two_servers_that_start_on_one_port_the_later_says_so(settings: Settings, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = tmp_path / "late.py"
    script.write_text(LATE.format(path=str(Path(FAKE[-1]))), encoding="utf-8")
    settings = settings.model_copy(update={"host": "127.0.0.1", "port": port})
    with Served(settings, (sys.executable, str(script), str(tmp_path / "go"))) as late:
        eventually(lambda: (tmp_path / "go.waits").exists())
        with socket.create_server(("127.0.0.1", port)):
            (tmp_path / "go").touch()
            assert late.ended()[0] == 1
        assert late.lines[-1] == f"refused: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
        assert "Traceback" not in "".join(late.lines)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_engines_start_ends_the_start(settings: Settings, tmp_path: Path, number: int) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE.format(path=str(Path(FAKE[-1]))), encoding="utf-8")
    with Served(settings, (sys.executable, str(script), str(tmp_path / "go"))) as served:
        eventually(lambda: (tmp_path / "go.waits").exists())
        served.process.send_signal(number)
        assert served.ended() == (0, "returned\n")
        assert "Traceback" not in "".join(served.lines)
        engine = int((tmp_path / "go.waits").read_text())
        eventually(lambda: not Path(f"/proc/{engine}").exists())


def test_keys_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INSTEP_API_KEYS", "instep_admin_key", "INSTEP_API_KEYS_FILE", "INSTEP_PORT"):
        monkeypatch.setenv(name, "1")
    main.forget_secrets()
    assert {name for name in os.environ if name.upper().startswith("INSTEP")} >= {"INSTEP_API_KEYS_FILE", "INSTEP_PORT"}
    assert not {"INSTEP_API_KEYS", "instep_admin_key"} & set(os.environ)


def test_the_engines_are_given_settings_without_keys(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []
    real = main.Supervisor
    monkeypatch.setattr(main, "Supervisor", lambda settings, *a, **k: given.append(settings) or real(settings, *a, **k))
    key = "sk-0123456789abcdef"
    app = main.create_app(settings.model_copy(update={"api_keys": key, "admin_key": f"{key}2"}))
    assert key not in pickle.dumps([given, app.state.front.settings, app.state.front.keys]).decode("latin-1")
    assert len(given) == 1 and app.state.front.keys.find(key.encode()).name == "key-1"


def test_an_empty_folder_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no cards in"):
        main.create_app(Settings(models=tmp_path))
