"""Where the blocks of one document are run: a fresh folder with `models/`, a Hub on loopback, and a server when asked.

The console scripts, curl and Python are the real ones; a block is changed in one word, the server's port.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

from app.cards.cards import read_cards
from tests.parts.hub import Hub
from tests.parts.published import MODELS, write_clone, write_single_files
from tests.parts.servers import free_port
from tests.parts.waiting import eventually
from tests.readmes.blocks import Block
from tests.readmes.edit import FOLDER as EDIT

BIN = Path(sys.executable).parent
TOKEN = "hf_0123456789"
FOREIGN = re.compile(r"(?i)^(HF_|HUGGING|INSTEP_|OPENAI_|XDG_|PYTHON|.*_proxy$)")
"""Variables of the machine that must not decide what a block does."""
PATIENCE = 500


def clone(folder: Path) -> Path:
    """Write what every stand begins with, and the names of the gated repositories."""
    gated = write_clone(folder / "models", folder / "hub")
    write_single_files(folder, folder / "hub")
    shutil.copytree(EDIT, folder / "docs" / "edit")
    (folder / "gated.json").write_text(json.dumps(sorted(gated)))
    return folder


class Stand:
    """A folder in which blocks run in the order of their document, while it is entered. clone: what `clone` wrote."""

    def __init__(self, folder: Path, clone: Path) -> None:
        self.folder = folder
        shutil.copytree(clone, folder, symlinks=True, dirs_exist_ok=True)
        gated = json.loads((folder / "gated.json").read_text())
        self.hub = Hub(folder / "hub", gated=tuple(gated), token=TOKEN)
        self.hub.revisions = {str(card.source.revision) for card in read_cards(MODELS).values() if card.source.repo}
        self.port = free_port()
        own = {"HOME": str(folder / "home"), "HF_ENDPOINT": self.hub.url, "HF_TOKEN": TOKEN, "COLUMNS": "100"}
        own |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "INSTEP_PORT": str(self.port)}
        own |= {"INSTEP_THREADS": "1"}  # two threads wait for each other for ever on a busy machine
        self.environment = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)} | own
        self.server: subprocess.Popen[bytes] | None = None
        self.prepared: set[str] = set()

    def __enter__(self) -> Stand:
        self.hub.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()
        self.hub.__exit__(*error)

    def run(self, block: Block) -> str:
        """Do what a reader would do with the block, and return what it prints."""
        text = block.text.replace("localhost:8000", f"localhost:{self.port}").replace(":8000", f":{self.port}")
        if block.file:
            place = self.folder / block.file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
            return ""
        if re.search(r"^(\w+=\S* )*instep serve", text, re.MULTILINE):
            return self.serve(text)
        if f"localhost:{self.port}" in text and self.server is None:
            self.serve("instep serve")
        if block.language == "python":
            return self.call([str(BIN / "python"), "-c", text])
        return self.call(["bash", "-euo", "pipefail", "-c", text])

    def call(self, words: list[str]) -> str:
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{words[-1]}\n{done.stdout}\n{done.stderr}"
        for out in re.findall(r"(?:-o|--out) (\S+\.(?:png|jpe?g|webp))", words[-1]):
            picture(self.folder / out)
        return done.stdout

    def serve(self, text: str) -> str:
        """Start what the text starts, in the place of what was served before; wait until it is ready."""
        self.stop()
        log = self.folder / "server.log"
        with log.open("wb") as stream:
            self.server = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", re.sub(r"^((\w+=\S* )*)(instep serve)", r"\1exec \3", text)],
                cwd=self.folder, env=self.environment, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
        eventually(lambda: self.ready() or self.server.poll() is not None, PATIENCE, log.read_text, pause=0.2)
        assert self.server.poll() is None, log.read_text(encoding="utf-8")
        return log.read_text(encoding="utf-8")

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://localhost:{self.port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """End the server as an orchestrator does; it must exit with 0."""
        if self.server is not None:
            server, self.server = self.server, None
            server.send_signal(signal.SIGTERM)
            try:
                assert server.wait(60) == 0, (self.folder / "server.log").read_text(encoding="utf-8")
            finally:
                server.kill()

    def prepare(self, heading: str, *models: str) -> None:
        """Once for a heading: get these models as its text says, with the `convert` that a pull may end with."""
        if heading not in self.prepared and models:
            self.prepared.add(heading)
            for line in self.call(["instep", "models", "pull", *models]).splitlines():
                if "instep models convert" in line:
                    self.call(["bash", "-c", line.partition("next: ")[2]])


def picture(file: Path) -> Image.Image:
    """A picture with something in it."""
    with Image.open(file) as image:
        image.load()
    assert len(image.convert("RGB").getcolors(image.width * image.height) or ()) > 10, f"{file} is empty"
    return image
