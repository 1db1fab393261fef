"""A Hub on loopback: repositories are folders; lists them, serves their files, notes down who asks for what.

Knows nothing of the app. The routes and headers are those that huggingface_hub asks the real one for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(ThreadingHTTPServer):
    """Serves `root/<owner>/<name>` while it is entered. gated: repositories that want this token, and its text."""

    def __init__(self, root: Path, gated: tuple[str, ...] = (), token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.gated, self.token = root, gated, token
        self.asked: list[tuple[str, str]] = []
        """(file or route, authorization) of every request for a repository."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        super().__exit__(*error)


class Handler(BaseHTTPRequestHandler):
    """`/api/models/<repo>/tree/<revision>` and `/<repo>/resolve/<revision>/<file>`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        words = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        repo, folder = "/".join(words[:2]), self.server.root / "/".join(words[:2])
        key = self.headers.get("authorization", "")
        if len(words) < 4 or not folder.is_dir():
            return self.refuse(404, "RepoNotFound")
        self.server.asked.append(("/".join(words[4:]) or words[2], key))
        if repo in self.server.gated and key != f"Bearer {self.server.token}":
            return self.refuse(401, "GatedRepo")
        if words[2] == "tree":
            return self.answer(
                json.dumps([entry(file, folder) for file in folder.rglob("*") if file.is_file()]).encode()
            )
        file = folder / "/".join(words[4:])
        return self.answer(file.read_bytes()) if file.is_file() else self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *words: Any) -> None:
        """Nothing: tests read `asked`."""


def entry(file: Path, folder: Path) -> dict[str, object]:
    """A file as the tree of a repository lists it."""
    digest = hashlib.sha1(file.read_bytes()).hexdigest()
    return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": digest}
