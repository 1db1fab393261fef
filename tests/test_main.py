"""`serve` as a process of its own, with a fake worker: start, drain, signals, and what cannot start."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app import main
from app.errors import SettingsError
from app.settings import Settings
from tests.api.conftest import FAKE, eventually, write_cards

CODE = """
import sys
from functools import partial
from app import main
from app.errors import InstepError
from app.settings import Settings
main.Supervisor = partial(main.Supervisor, command=sys.argv[2:])
try:
    main.serve(Settings.model_validate_json(sys.argv[1]))
except InstepError as error:
    sys.exit(f"refused: {error.message}")
print("returned")
"""
REFUSES = """
import socket, sys
from app.errors import SettingsError
from app.worker import wire
sock = socket.socket(fileno=int(sys.argv[1]))
wire.receive(sock)
wire.send(sock, wire.Refusal(SettingsError("no such device")))
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


class Served:
    """A server process and what it has logged."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = FAKE, **environment: str) -> None:
        """environment: more of the settings, as INSTEP_ variables."""
        words = [sys.executable, "-c", CODE, settings.model_dump_json(exclude_unset=True), *command]
        root, pipe = Path(main.__file__).parent.parent, subprocess.PIPE
        environment = {**os.environ, **environment}
        self.process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=root, env=environment)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def logged(self, event: str) -> dict[str, object]:
        """The first line of this event, waited for."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for line in list(self.lines):
                if line.startswith("{") and json.loads(line)["event"] == event:
                    return dict(json.loads(line))
            time.sleep(0.01)
        raise AssertionError(f"{event} not in {self.lines}")

    def ended(self) -> tuple[int, str]:
        """The exit code and what was printed, once it has ended."""
        assert self.process.stdout
        code = self.process.wait(60)
        self._reader.join(10)
        return code, self.process.stdout.read()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(models=write_cards(tmp_path / "models"), devices="cpu", preload="all", port=0, drain=20)


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    served = Served(settings)
    yield served
    served.process.kill()
    served.process.wait()


def refuses(url: str) -> bool:
    """Whether new connections are refused."""
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    except (httpx.NetworkError, httpx.RemoteProtocolError):  # it came in the moment in which the socket was closed
        return False
    return False


class Clients:
    """One that waits for its image and one that streams it, both being drawn for when this is made."""

    def __init__(self, url: object, prompt: str) -> None:
        self.url = f"{url}/v1/images/generations"
        self.replies: dict[bool, httpx.Response] = {}
        self.threads = [threading.Thread(target=self._ask, args=(prompt, stream)) for stream in (False, True)]
        for thread in self.threads:
            thread.start()
        eventually(lambda: httpx.get(f"{url}/health").json()["running"] == 2)

    def _ask(self, prompt: str, stream: bool) -> None:
        body = {"prompt": prompt, "model": "tiny-text", "stream": stream}
        with httpx.Client(timeout=60, verify=False) as http:
            self.replies[stream] = http.post(self.url, json=body)

    def answers(self) -> tuple[httpx.Response, httpx.Response]:
        """The whole reply and the stream, once both have ended."""
        for thread in self.threads:
            thread.join(60)
        return self.replies[False], self.replies[True]


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


def test_what_outlives_the_drain_is_told_so(settings: Settings) -> None:
    served = Served(settings.model_copy(update={"drain": 0.5}))
    try:
        url = served.logged("listening")["url"]
        clients = Clients(url, "!slow 60")
        served.process.send_signal(signal.SIGTERM)
        whole, stream = clients.answers()
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in whole.headers
        assert '"code":"shutting_down"' in stream.text
        assert served.ended() == (0, "returned\n")
    finally:
        served.process.kill()


def test_a_worker_that_refuses_is_one_line(settings: Settings, tmp_path: Path) -> None:
    script = tmp_path / "refuses.py"
    script.write_text(REFUSES, encoding="utf-8")
    served = Served(settings, (sys.executable, str(script)))
    code, _ = served.ended()
    assert code == 1
    assert served.lines[-1] == "refused: no such device\n"
    assert "Traceback" not in "".join(served.lines)


def test_a_port_in_use_is_one_line(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            main.listen("127.0.0.1", port)


def test_of_two_servers_that_start_on_one_port_the_later_says_so(settings: Settings, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = tmp_path / "late.py"
    script.write_text(LATE.format(path=str(Path(FAKE[1]))), encoding="utf-8")
    settings = settings.model_copy(update={"host": "127.0.0.1", "port": port})
    late = Served(settings, (sys.executable, str(script), str(tmp_path / "go")))
    try:
        eventually(lambda: (tmp_path / "go.waits").exists())
        with socket.create_server(("127.0.0.1", port)):
            (tmp_path / "go").touch()
            assert late.ended()[0] == 1
        assert late.lines[-1] == f"refused: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
        assert "Traceback" not in "".join(late.lines)
    finally:
        late.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_engines_start_ends_the_start(settings: Settings, tmp_path: Path, number: int) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE.format(path=str(Path(FAKE[1]))), encoding="utf-8")
    served = Served(settings, (sys.executable, str(script), str(tmp_path / "go")))
    try:
        eventually(lambda: (tmp_path / "go.waits").exists())
        served.process.send_signal(number)
        assert served.ended() == (0, "returned\n")
        assert "Traceback" not in "".join(served.lines)
        engine = int((tmp_path / "go.waits").read_text())
        eventually(lambda: not Path(f"/proc/{engine}").exists())
    finally:
        served.process.kill()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_answer_waits_for_an_acknowledgement(host: str) -> None:
    async def without_delay() -> int:
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        listener = main.listen(host, 0)
        async with await asyncio.start_server(lambda _, writer: accepted.put(writer), sock=listener):
            _, client = await asyncio.open_connection(*listener.getsockname()[:2])
            server = await accepted.get()
            client.close()
            server.close()
            return server.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert asyncio.run(without_delay())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "files", "told"),
    [
        (100, 500, False),
        (300, 300 + main.OTHER_FILES, False),
        (0, 2000, False),
        (1744, 2000, False),
        (1745, 2000, True),
    ],
)
def test_there_is_room_for_the_connections(connections: int, files: int, told: bool) -> None:
    """0 is for as many as there can be. What is set is asked of the system, in a process that has its own limits."""
    code = f"""
import resource, sys
from app import logs, main
resource.setrlimit(resource.RLIMIT_NOFILE, (500, 2000))
logs.setup("warning")
main.make_room({connections})
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == [str(files), "2000"]
    assert ('"event": "fewer connections"' in done.stderr) == told


def test_a_limit_that_is_none_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    endless, given = resource.RLIM_INFINITY, list[tuple[int, int]]()
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    for soft in (500, endless):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, endless))
        main.make_room(0)
    assert given == [(main.MOST_FILES, endless)]


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


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on 203\.0\.113\.1, port 0: "):
        main.listen("203.0.113.1", 0)


def test_an_empty_folder_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no cards in"):
        main.create_app(Settings(models=tmp_path))
