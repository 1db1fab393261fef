"""Process: a server under another policy: `app.bench.process serve POLICY SETTINGS`, and its engine, `POLICY FD`.

Knows nothing of load or of time. The front is the real one, with another command for its engine processes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from app.errors import EngineError
from app.report import Report
from app.settings import Settings
from app.worker import process, wire

if TYPE_CHECKING:
    from app.engine.engine import Engine
    from app.pool.pool import Pool

PATIENCE = 1800.0
"""Seconds that a model may take to load and to be measured."""

ENDLESS = 1e12
"""Seconds of queue: nothing is refused, because what is measured is the time that all of it takes."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""To a server of our own, whatever proxy the environment names."""


@contextmanager
def serving(policy: str, settings: Settings, model: str) -> Iterator[tuple[str, int]]:
    """Host and port of a server under this policy, once the model is loaded. Raises EngineError with its last words."""
    given = settings.without_secrets().model_copy(
        update={
            "host": "127.0.0.1", "port": 0, "preload": model, "max_wait": ENDLESS, "max_connections": 0,
            "connections_per_address": 0, "api_keys_file": "", "drain": 0.0, "log_level": "info",
            "text_cache": "0",  # a trace that repeats repeats its prompts, which users do not
        }
    )  # fmt: skip
    command = (sys.executable, "-m", "app.bench.process", "serve", policy, given.model_dump_json())
    with tempfile.TemporaryFile() as log:  # not a pipe: nobody reads it while the server writes
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield _ready(policy, server, log, model)
        finally:
            _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _ready(policy: str, server: subprocess.Popen[bytes], log: IO[bytes], model: str) -> tuple[str, int]:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        found = re.search(r"http://(127\.0\.0\.1):(\d+)", _said(log))
        if found and _get(f"{found[0]}/readyz")[0] == 200:
            return found[1], int(found[2])
        if found and b'"failed"' in _get(f"{found[0]}/v1/models/{model}")[1]:
            break
        time.sleep(0.1)
    raise EngineError(f"the server of policy {policy} did not get ready: {_said(log)[-1000:]}")


def _said(log: IO[bytes]) -> str:
    """What the server has written; without `seek`, which would move the place where it writes too."""
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")


def forwards(address: tuple[str, int]) -> tuple[float, float]:
    """How many denoising forwards there were so far and the rows in them, by the server's own metrics."""
    text = _get(f"http://{address[0]}:{address[1]}/metrics")[1].decode()
    found = re.findall(r"^instep_batch_rows_(count|sum){.*} (\S+)$", text, re.MULTILINE)
    count, rows = (sum(float(value) for name, value in found if name == what) for what in ("count", "sum"))
    return count, rows


def _get(url: str) -> tuple[int, bytes]:
    """Status and body; (0, b"") while nobody listens."""
    try:
        with _DIRECT.open(url, timeout=10) as reply:
            return int(reply.status), bytes(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, b""
    except OSError:
        return 0, b""


def serve(policy: str, settings: Settings) -> None:
    """The front of such a server; its engines run under the policy."""
    from app.cards.card import read_cards
    from app.main import create_app
    from app.main import serve as serve_app
    from app.metrics import Metrics
    from app.worker.supervisor import Supervisor

    metrics = Metrics()
    command = (sys.executable, "-m", "app.bench.process", policy)
    supervisor = Supervisor(
        settings, read_cards(settings.models, settings.alias), observe=metrics.observe, command=command
    )
    serve_app(settings, create_app(settings, supervisor=supervisor, metrics=metrics))


def engine(policy: str, descriptor: int, pulse: int) -> int:
    """The engine process of such a server. Returns the exit code."""

    def make(start: wire.Start, emit: Callable[[Report], None]) -> tuple[Pool, Engine]:
        from app.bench.policies import POLICIES

        chosen = POLICIES[policy]
        return process.build(start, emit, batcher=chosen.batcher, runner=chosen.runner)

    return process.main(descriptor, pulse, make)


def _run(words: list[str]) -> None:
    if words[0] == "serve":
        return serve(words[1], Settings(**json.loads(words[2])))
    code = 1
    try:
        code = engine(words[0], int(words[1]), int(words[2]))
    except Exception:
        logging.getLogger("instep.worker").exception("the engine process ends")
    logging.shutdown()
    os._exit(code)  # as the worker does: threads that load would hold up the exit


if __name__ == "__main__":
    _run(sys.argv[1:])
