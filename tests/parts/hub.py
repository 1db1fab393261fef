"""A Hub on loopback: repositories are folders; lists them, serves their files, notes down who asks for what.

The routes, headers and refusals are those of the real one, as huggingface_hub reads them:
large files (safetensors) have the sha256 of their bytes and come from another host, small ones have git's sha1.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Server(ThreadingHTTPServer):
    """Serves on loopback while it is entered."""

    daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Any:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that has enough goes away."""


class Hub(Server):
    """Serves `root/<owner>/<name>`. token: the one that it knows. gated: repositories that want a token.

    accepted: whether the token's account has accepted the licences. sizes: what is listed in the place of true sizes.
    cut: how many of the next answers of a file break off half-way. flipped: files of which one byte is another.
    whole: files of which no range is served. asked: (file or route, authorization, range) of every request.
    stored: the same of the host of the large files. revisions: commits that every repository has beside COMMIT.
    """

    def __init__(self, root: Path, gated: tuple[str, ...] = (), token: str = "", accepted: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.gated, self.token, self.accepted = root, gated, token, accepted
        self.sizes: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.flipped: set[str] = set()
        self.whole: set[str] = set()
        self.revisions: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        self.stored: list[tuple[str, str, str]] = []
        self.storage = Storage(self)

    def __enter__(self) -> Hub:
        self.storage.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.storage.__exit__(*error)

    def files(self, repo: str) -> dict[str, Path]:
        folder = self.root / repo
        return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


class Storage(Server):
    """The host of the large files: the Hub sends there whoever may have them."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), StorageHandler)
        self.hub = hub


class Sender(BaseHTTPRequestHandler):
    """What both hosts do."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def send(self, hub: Hub, path: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        """A file, or the range of it that is asked for, and whatever is wrong with it today."""
        if path in hub.flipped:
            body = body[:-1] + bytes([body[-1] ^ 1])
        asked = self.headers.get("range", "").removeprefix("bytes=").removesuffix("-")
        start = int(asked) if asked and path not in hub.whole else 0
        if start >= len(body) > 0:
            return self.answer(416, b"")
        rest, extra = body[start:], dict(headers or {})
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if hub.cut.get(path, 0) and self.command == "GET":
            hub.cut[path] -= 1
            self.answer(206 if start else 200, rest, extra, sent=rest[: len(rest) // 2])
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, rest, extra)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: bytes | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent is None else sent)

    def seen(self, what: str) -> tuple[str, str, str]:
        return what, self.headers.get("authorization", ""), self.headers.get("range", "")

    def log_message(self, format: str, *words: Any) -> None:
        """Nothing: tests read `asked`."""


class Handler(Sender):
    """`/api/models/<repo>[/revision/<rev>]`, `/api/models/<repo>/tree/<rev>`, `/<repo>/resolve/<rev>/<file>`."""

    server: Hub

    def do_GET(self) -> None:
        hub, words = self.server, self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        repo, route, path = "/".join(words[:2]), (words[2:] or ["revision"])[0], "/".join(words[4:])
        if not self.path.startswith("/api/models/") and route != "resolve":
            return self.answer(404, b"")  # what the Hub library asks for beside repositories
        hub.asked.append(self.seen(path or route))
        key = self.headers.get("authorization", "")
        if key and key != f"Bearer {hub.token}":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if not (hub.root / repo).is_dir():
            return self.refuse(404 if key else 401, "RepoNotFound", "Repository not found")
        revision = (words[3:] or ["main"])[0]
        if revision not in ("main", COMMIT, *hub.revisions):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if route == "revision":
            sha, gated = COMMIT if revision == "main" else revision, "auto" if repo in hub.gated else False
            told = {"id": repo, "sha": sha, "gated": gated, "siblings": []}
            return self.answer(200, json.dumps(told).encode())
        if route == "tree":
            listed = [entry(path, file, hub.sizes.get(path)) for path, file in hub.files(repo).items()]
            return self.answer(200, json.dumps(listed).encode())
        if repo in hub.gated and not (key and hub.accepted):
            return self.refuse(403 if key else 401, "GatedRepo", f"Access to model {repo} is restricted {key}")
        return self.resolve(repo, path)

    do_HEAD = do_GET

    def resolve(self, repo: str, path: str) -> None:
        file = self.server.files(repo).get(path)
        if file is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        listed = entry(path, file, self.server.sizes.get(path))
        commit, lfs = {"X-Repo-Commit": COMMIT}, listed.get("lfs")
        if lfs is None:
            return self.send(self.server, path, file.read_bytes(), commit | {"ETag": f'"{listed["oid"]}"'})
        linked = {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(lfs["size"])}
        return self.answer(302, b"", {**commit, **linked, "Location": f"{self.server.storage.url}/{repo}/{path}"})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, b"", {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})


class StorageHandler(Sender):
    """`/<repo>/<file>`."""

    server: Storage

    def do_GET(self) -> None:
        hub, words = self.server.hub, self.path.strip("/").split("/")
        path = "/".join(words[2:])
        hub.stored.append(self.seen(path))
        self.send(hub, path, hub.files("/".join(words[:2]))[path].read_bytes())


def large(path: str) -> bool:
    return path.endswith(".safetensors")


def entry(path: str, file: Path, size: int | None) -> dict[str, Any]:
    """A file as the tree of a repository lists it."""
    body = file.read_bytes()
    count = len(body) if size is None else size
    told: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": count,
        "oid": hashlib.sha1(b"blob %d\0%b" % (len(body), body)).hexdigest(),
    }
    if large(path):
        told["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": count, "pointerSize": 130}
    return told
