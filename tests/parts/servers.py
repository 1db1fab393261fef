"""Servers on real sockets, in a thread of the tests' process or in a process of its own, and clients of them."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from app.cards.cards import read_cards
from app.main import Reread, configured, create_app
from app.metrics import Metrics
from app.settings import Settings
from app.worker.supervisor import WORKER, Supervisor
from tests.parts.waiting import eventually
from tests.parts.workers import FAKE

ROOT = Path(__file__).parents[2]
ALICE, BOB, ADMIN = ("sk-alice-0123456789", "sk-bob-9876543210", "sk-admin-0011223344")
"""Keys of the closed server: one for every model, one for tiny-label alone, one for everything."""

INSTEP = (sys.executable, "-c", "from app.cli import main; main()")
"""The command line of this checkout; the console script imports the one that is installed."""
FAKED = """
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def wait_ready(url: str, patience: float = 100.0, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until a server says that it is ready; it need not listen yet. Asserts that it stays alive."""

    def ready() -> bool:
        assert alive(), "the server ended before it was ready"
        return httpx.get(f"{url}/readyz").status_code == 200

    eventually(ready, patience, pause=0.1, despite=httpx.HTTPError)


class Server:
    """A real uvicorn on a loopback port, in a thread of its own, around a worker in a process of its own.

    As a context it is started when entered, and stopped when left.
    """

    def __init__(self, settings: Settings, command: tuple[str, ...] = FAKE, reread: Reread = None) -> None:
        self.metrics = Metrics()
        cards = read_cards(settings.models)
        self.supervisor = Supervisor(settings.without_secrets(), cards, observe=self.metrics.observe, command=command)
        self.app = create_app(settings, reread=reread, supervisor=self.supervisor, metrics=self.metrics)
        self.uvicorn = uvicorn.Server(configured(self.app, settings))
        self._thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def start(self) -> str:
        """Returns the base URL, which connections are accepted at from now on."""
        self._thread.start()
        eventually(lambda: self.uvicorn.started or not self._thread.is_alive(), 100, lambda: "the server did not start")
        assert self._thread.is_alive(), "the server did not start"
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self.url

    def ready(self) -> Server:
        """Wait until the models of `preload` are loaded."""
        wait_ready(self.url)
        return self

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


@contextmanager
def real_server(**settings: object) -> Iterator[httpx.Client]:
    """A client of a server with the real worker on a CPU, once it is ready.

    float32: in bfloat16, which a server takes where a processor has it, who shares a batch may show by a level more.
    """
    facts = Settings(devices="cpu", dtype="float32", port=0, drain=5, **settings)
    with Server(facts, WORKER) as server, httpx.Client(base_url=server.ready().url, timeout=100) as http:
        yield http


class Process:
    """A server that is a process of its own, and what it has written. Killed when the context is left.

    printed, lines: the lines of stdout and stderr; a terminal, which is both, writes into `lines`.
    environment: variables beside those of this process, of which INSTEP_ ones are not passed on.
    """

    def __init__(self, command: Sequence[str], *, terminal: bool = False, cwd: Path = ROOT, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("INSTEP_")}
        out, theirs = os.pipe()
        errors, err = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=err if terminal else theirs,
            stderr=err,
            cwd=cwd,
            env=inherited | environment,
        )
        os.close(theirs)
        os.close(err)
        self.printed: list[str] = []
        self.lines: list[str] = []
        pairs = ((out, self.printed), (errors, self.lines))
        self._readers = [threading.Thread(target=_read, args=pair, daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    @property
    def words(self) -> str:
        """Everything that it has written."""
        return "".join((*self.printed, *self.lines))

    def logged(self, event: str) -> dict[str, Any]:
        """The first JSON line of this event, waited for."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            ended = self.process.poll() is not None
            lines = (json.loads(line) for line in (*self.lines, *self.printed) if line.startswith("{"))
            found.extend(line for line in lines if line["event"] == event)
            assert found or not ended, f"{event} not in {self.words}"
            return bool(found)

        eventually(look, 100, lambda: f"{event} not in {self.words}")
        return found[0]

    @cached_property
    def url(self) -> str:
        """Where it listens, once it does."""
        return str(self.logged("listening")["url"])

    def wait_ready(self, patience: float = 100.0) -> None:
        """Wait until the models of `preload` are loaded."""
        wait_ready(self.url, patience, lambda: self.process.poll() is None)

    def ended(self) -> tuple[int, str]:
        """The exit code and what was printed, once it has ended."""
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join(10)
        return code, "".join(self.printed)

    def stop(self) -> None:
        """End it as an orchestrator does; it must exit with 0."""
        self.process.send_signal(signal.SIGTERM)
        assert self.ended()[0] == 0, self.words

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def _read(end: int, lines: list[str]) -> None:
    with open(end, "rb") as file:
        try:
            lines.extend(line.decode(errors="replace").replace("\r\n", "\n") for line in iter(file.readline, b""))
        except OSError:  # the end of a terminal
            return


class Served(Process):
    """`serve` with these settings and this worker. It prints "returned" at its end, or "refused: WHY" as its error."""

    def __init__(self, settings: Settings, command: Sequence[str] = FAKE, **environment: str) -> None:
        """environment: more of the settings, as INSTEP_ variables."""
        words = (sys.executable, "-c", FAKED, settings.model_dump_json(exclude_unset=True), *command)
        super().__init__(words, **environment)


def refuses(url: str) -> bool:
    """Whether new connections are refused."""
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return True
    except (httpx.NetworkError, httpx.RemoteProtocolError):  # it came in the moment in which the socket was closed
        return False
    return False


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def generate(http: httpx.Client, body: dict[str, object], accept: str = "application/json") -> httpx.Response:
    return http.post("/v1/images/generations", json=body, headers={"Accept": accept})


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
