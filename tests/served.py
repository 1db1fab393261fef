"""`serve` as a process of its own with a fake worker, and clients that wait for their pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from app import main
from app.settings import Settings
from tests.api.conftest import FAKE, eventually

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
