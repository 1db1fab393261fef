"""How fast a server takes large bodies.

    python -m tests.bench.bodies [--tree PATH]

One client sends bodies of 24 MB, with a length or in chunks, to a route that does not exist: so they are read and
dropped, and nothing else is measured. Prints the median megabytes a second of each kind, and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from datetime import date
from pathlib import Path

from tests.bench.loop import ROOT, serving

SIZE, TIMES = 24 * 1024 * 1024, 3
CHUNKS = {"with a length": 0, "chunks of 64 kB": 65536, "chunks of 1 kB": 1024}
"""Bytes of a chunk; 0 is a body with Content-Length."""


def request(chunk: int) -> bytes:
    head = "POST /v1/nowhere HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    if not chunk:
        return f"{head}Content-Length: {SIZE}\r\n\r\n".encode() + bytes(SIZE)
    return (
        f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()
        + (b"%x\r\n" % chunk + bytes(chunk) + b"\r\n") * (SIZE // chunk)
        + b"0\r\n\r\n"
    )


def seconds(address: str, data: bytes) -> float:
    """From the first byte that is sent to the end of the answer."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=120) as wire:
        started = time.perf_counter()
        wire.sendall(data)
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 404"), answer[:200]
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tree", type=Path, default=ROOT)
    args = parser.parse_args()
    found = {}
    with serving(args.tree) as address:
        for name, chunk in CHUNKS.items():
            data = request(chunk)
            rates = [SIZE / 1e6 / seconds(address, data) for _ in range(TIMES)]
            found[name] = round(statistics.median(rates), 1)
            print(f"{name:16} {found[name]:8.1f} MB/s", flush=True)
    print(json.dumps({"bench": "bodies", "date": str(date.today()), "megabytes a second": found}))


if __name__ == "__main__":
    main()
