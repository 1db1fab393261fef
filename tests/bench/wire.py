"""What hostile connections cost others: `python -m tests.bench.wire [CHECKOUT]`. Ends by itself, in one JSON line.

A real `instep serve` on a loopback port for each case: silent sockets over the cap, senders that drip their headers,
few open files, a stalled upload at SIGTERM, a second Ctrl-C, and signals while a server starts. CHECKOUT: another
folder of this repository, whose code is served instead; the clients are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path

from tests.parts.servers import INSTEP, Process

ROOT = Path(__file__).parents[2]
SERVE = (*INSTEP, "serve", "--devices", "cpu", "--port", "0")
SILENT, SLOW, FEW, CROWD = 1050, 500, 64, 200
"""Silent sockets; slow senders; open files that a server may have, and the sockets that it meets then."""

PATIENCE = 5.0
"""Seconds that a client waits for /healthz."""

TRIES = 20
LOGGED = 10.0
"""Seconds for which the log is watched."""

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n"
UPLOAD = POST + b"Content-Length: 5000000\r\n\r\n{"
LONG = b'{"prompt": "a red apple", "model": "emoji-mmdit", "num_inference_steps": 250, "n": 4}'
MOMENTS = [moment / 1000 for moment in range(0, 1001, 50)]
"""Seconds from the start of a process to a signal."""


@contextmanager
def serving(checkout: Path, files: int = 0, drain: float = 2) -> Iterator[Process]:
    """files: open files that the process may have at most; 0 for what this process may."""
    words = [*SERVE, "--drain", str(drain)]
    if files:
        words = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *words]
    with Process(words, cwd=checkout, **os.environ) as server:
        assert server.url
        yield server


def connect(server: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), PATIENCE)


def health(server: Process) -> float | None:
    """Seconds to the answer of one probe; None where there is none."""
    begin = time.perf_counter()
    with suppress(OSError), connect(server) as wire:
        wire.sendall(HEALTH)
        if wire.recv(12) == b"HTTP/1.1 200":
            return time.perf_counter() - begin
    return None


def probes(server: Process) -> dict[str, object]:
    seconds = [health(server) for _ in range(TRIES)]
    known = [second for second in seconds if second is not None]
    return {"probes": TRIES, "answered": len(known), "worst_ms": round(1000 * max(known), 1) if known else None}


def silent(checkout: Path) -> dict[str, object]:
    with serving(checkout) as server, ExitStack() as stack:
        for _ in range(SILENT):
            stack.enter_context(connect(server))
        return {"sockets": SILENT, **probes(server)}


def slow(checkout: Path) -> dict[str, object]:
    """Seconds until the last of them is closed; each sends one header a second."""
    with serving(checkout) as server, ExitStack() as stack:
        wires = {stack.enter_context(connect(server)) for _ in range(SLOW)}
        begin = time.perf_counter()
        for wire in wires:
            wire.sendall(b"GET /healthz HTTP/1.1\r\n")
        while wires and time.perf_counter() - begin < 60:
            time.sleep(1)
            for wire in list(wires):
                if select.select([wire], [], [], 0)[0] or not _sent(wire):
                    wires.discard(wire)
        return {"senders": SLOW, "left": len(wires), "seconds": round(time.perf_counter() - begin, 1)}


def _sent(wire: socket.socket) -> bool:
    try:
        wire.sendall(b"X-A: b\r\n")
    except OSError:
        return False
    return True


def stalled(checkout: Path) -> dict[str, object]:
    """SIGTERM during an upload that has stopped."""
    with serving(checkout) as server, connect(server) as wire:
        wire.settimeout(60)
        wire.sendall(UPLOAD)
        time.sleep(0.5)
        begin = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        answer = wire.recv(65536)
        seconds = time.perf_counter() - begin
        wire.close()
        code = server.process.wait(60)
        found = re.search(rb"content-type: ([^\r]+)", answer)
        return {
            "drain": 2,
            "seconds": round(seconds, 2),
            "status": int(answer[9:12]),
            "type": found[1].decode() if found else "",
            "tracebacks": server.words.count("Traceback"),
            "exit": code,
        }


def few(checkout: Path) -> dict[str, object]:
    """More clients than files."""
    with serving(checkout, FEW) as server, ExitStack() as stack:
        for _ in range(CROWD):
            with suppress(OSError):
                stack.enter_context(connect(server))
        before = len(server.words)
        time.sleep(LOGGED)
        logged = (len(server.words) - before) / LOGGED
        return {"files": FEW, "sockets": CROWD, "log_bytes_per_second": round(logged), **probes(server)}


def hurried(checkout: Path) -> dict[str, object]:
    """Two SIGINT, a second apart, while pictures are drawn."""
    with serving(checkout, drain=30) as server, connect(server) as wire:
        wire.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(LONG), LONG))
        for _ in range(2):
            time.sleep(1)
            begin = time.perf_counter()
            server.process.send_signal(signal.SIGINT)
        code = server.process.wait(60)
        return {"drain": 30, "seconds": round(time.perf_counter() - begin, 2), "exit": code}


def starting(checkout: Path) -> dict[str, object]:
    """How many of the starts that a signal ended had exit code 0, and after which moments another one."""
    others = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        for moment in MOMENTS:
            process = subprocess.Popen(SERVE, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moment)
            process.send_signal(number)
            if code := process.wait(60):
                others[f"{number.name} {moment}"] = code
    return {"starts": 2 * len(MOMENTS), "exit_0": 2 * len(MOMENTS) - len(others), "others": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    checkout = parser.parse_args().checkout.resolve()
    cases = {case.__name__: case(checkout) for case in (silent, slow, few, stalled, hurried, starting)}
    print(json.dumps({"date": date.today().isoformat(), **cases}))


if __name__ == "__main__":
    main()
