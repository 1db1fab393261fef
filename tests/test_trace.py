"""One prompt, followed from the socket to the PNG through both processes: how many files and classes it passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.parts.servers import Server
from tests.parts.tracing import Tracer
from tests.parts.waiting import eventually

ROOT = Path(__file__).parent.parent
FILES, CLASSES = 32, 13
"""They were 30 and 12 before bodies and replies grew past 400 lines each, and before a pass was more than a prompt."""

pytestmark = pytest.mark.slow


def test_what_a_prompt_passes(tmp_path: Path) -> None:
    found = trace(tmp_path)
    print(json.dumps(found, indent=1))
    files, classes = found["files"], found["classes"]
    assert {"engine/step.py", "imaging.py"} <= {*files}, "this is no trace of a prompt"
    assert len(files) <= FILES, files
    assert len(classes) <= CLASSES, classes


def trace(folder: Path) -> dict[str, list[str]]:
    """Files and classes of the second of two prompts, so that nothing is loaded or measured any more.

    The number of threads is fixed: a busy neighbour could change it in the middle, which is no part of a prompt.
    """
    tracer = Tracer()
    tracer.install()
    try:
        command = (sys.executable, str(ROOT / "tests" / "parts" / "traced_worker.py"), str(folder))
        settings = Settings(
            models=ROOT / "models", devices="cpu", port=0, preload="emoji-mmdit", cache=folder / "cache", threads=1
        )
        server = Server(settings, command)
        url = server.start()
        try:
            eventually(lambda: httpx.get(f"{url}/readyz").status_code == 200, 100)
            draw(url, "a frog on a green background")
            (folder / "on").touch()
            eventually((folder / "traced").exists)
            tracer.start()
            draw(url, "a heart")
            tracer.stop()
            (folder / "on").unlink()
            eventually((folder / "child.json").exists)
        finally:
            server.stop()
    finally:
        tracer.remove()
    child = json.loads((folder / "child.json").read_text(encoding="utf-8"))
    return {kind: sorted({*getattr(tracer, kind), *child[kind]}) for kind in ("files", "classes")}


def draw(url: str, prompt: str) -> None:
    body = {"prompt": prompt, "seed": 7, "num_inference_steps": 12, "guidance_scale": 4.0, "model": "emoji-mmdit"}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, headers={"Accept": "image/png"}, timeout=100)
    assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")
