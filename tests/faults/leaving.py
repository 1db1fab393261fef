"""A hundred clients that leave after 0.3 seconds, while one stays: `python -m tests.faults.leaving`.

A real server with an engine process that notes each forward and each cancel. One JSON line at the end: the seconds from
the last client's leaving to its cancel in the engine, and the forwards that were begun for any of them after that.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from app.settings import Settings
from tests.parts import noting_worker
from tests.parts.servers import ROOT, Server
from tests.parts.waiting import eventually
from tests.parts.wires import connect

CLIENTS = 100
PAUSE = 0.3
SEEN = 20
"""Forwards that a worker which does not act on cancels must begin, before it counts as one that goes on."""

FORMS = (
    ("application/json", {}), ("image/png", {}), ("application/json", {"stream": True, "partial_images": 2})
)  # fmt: skip


def send(stack: ExitStack, url: str, number: int, body: dict[str, Any]) -> Any:
    """The socket of a client that has sent its request in one of the three forms."""
    accept, more = FORMS[number % len(FORMS)]
    content = json.dumps(body | more | {"prompt": f"leaves {number}"}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\nContent-Length: {len(content)}\r\n"
    wire = stack.enter_context(connect(url))
    wire.sendall(head.encode() + b"\r\n" + content)
    return wire


def leave(models: Path, model: str, steps: int, notes: Path) -> dict[str, Any]:
    """A hundred clients come and leave. What the engine did after the last cancel had come."""
    settings = Settings(models=models, devices="cpu", preload=model, port=0, max_wait=1e6, drain=0, cache=notes.parent)
    command = (sys.executable, "-P", noting_worker.__file__, str(notes))
    body, kept = {"model": model, "num_inference_steps": steps}, []
    with Server(settings, command) as server:
        url = server.ready().url
        stays = threading.Thread(target=lambda: kept.append(
            httpx.post(f"{url}/v1/images/generations", json=body | {"prompt": "stays"}, timeout=300).status_code
        ))  # fmt: skip
        with ExitStack() as stack:
            for number in range(CLIENTS):
                send(stack, url, number, body)
            stays.start()
            eventually(lambda: server.supervisor.running + server.supervisor.waiting == CLIENTS + 1)
            eventually(lambda: "leaves" in notes.read_text(), 100)
            time.sleep(PAUSE)
            left = time.monotonic()
        if notes.suffix == ".deaf":
            eventually(lambda: after(notes)["forwards"] >= SEEN)
        else:
            stays.join(300)
    return {**after(notes, left), "stayed": kept}


def after(notes: Path, left: float = 0.0) -> dict[str, Any]:
    """Cancels; seconds from `left` to the last; the forwards begun after that for those who left, and for all."""
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    cancels = [number for number, line in enumerate(lines) if line[1] == "cancel"]
    if len(cancels) < CLIENTS:
        return {"cancels": len(cancels), "forwards": 0}
    later = [line[2] for line in lines[cancels[-1] :] if line[1] == "forward"]
    before = sum(line[1] == "forward" for line in lines[: cancels[0]])
    seconds = round(lines[cancels[-1]][0] - left, 3)
    return {
        "cancels": len(cancels), "seconds": seconds, "before": before,
        "forwards": sum("leaves" in rows for rows in later), "others": sum("stays" in rows for rows in later),
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"bench": "leaving", **leave(ROOT / "models", "emoji-mmdit", 100, Path(folder) / "notes")}))


if __name__ == "__main__":
    main()
