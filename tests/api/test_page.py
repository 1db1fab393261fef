"""The page's files on the wire and in the wheel."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urljoin
from zipfile import ZipFile

import httpx
import pytest
from flit_core.wheel import make_wheel_in

from app.api.page import FOLDER
from tests.parts.servers import ROOT, Server
from tests.parts.wires import asked, connect

FILES = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.is_file()}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", "": "text/plain"}


PROXY = "https://proxy/a/prefix/"


def links(address: str, text: str) -> set[str]:
    """What a page or a module names: modules beside itself, all else beside the page."""
    modules = {urljoin(address, name) for name in re.findall(r'\b(?:from|import)\s*"(\.[^"]+)"', text)}
    return modules | {urljoin(PROXY, name) for name in re.findall(r'(?:src|href)="([^"#$]+)"', text)}


def test_every_file_comes_as_it_is_and_is_asked_for_once(closed: Server) -> None:
    """Without a key, on a server that has some."""
    with httpx.Client(base_url=closed.url) as http:
        for name, path in {"/": FILES["index.html"], **{f"/page/{name}": path for name, path in FILES.items()}}.items():
            reply = http.get(name)
            assert (reply.status_code, reply.content) == (200, path.read_bytes()), name
            if path.suffix in TYPES:
                assert reply.headers["content-type"].partition(";")[0] == TYPES[path.suffix], name
            headers = {"If-None-Match": f'"other", {reply.headers["etag"]}'}
            again = http.get(name, headers=headers)
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", reply.headers["etag"])
            assert http.get(name, headers={"If-None-Match": '"other"'}).status_code == 200
    assert len({path.suffix for path in FILES.values()} & TYPES.keys()) == len(TYPES)


def test_a_page_may_load_from_this_server_alone(http: httpx.Client) -> None:
    for name in ("/", "/page/index.html", "/docs"):
        headers = http.get(name).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and not re.search(r"unsafe|http|\*|script-src[^;]*(data|blob)", policy)
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert http.get("/").headers["cache-control"] == "no-cache"


def test_what_the_page_names_is_there_also_behind_a_prefix(http: httpx.Client) -> None:
    """Its files and theirs, by addresses that are right wherever a proxy puts it."""
    todo, seen = {PROXY}, set()
    while todo:
        seen.add(address := todo.pop())
        assert address.startswith(PROXY)
        reply = http.get(f"/{address.removeprefix(PROXY)}")
        assert reply.status_code == 200, address
        if reply.headers["content-type"].startswith(("text/html", "text/javascript")) and "docs" not in address:
            todo |= links(address, reply.text) - seen
    assert {f"{PROXY}page/lib/preact.js", f"{PROXY}docs"} <= seen


@pytest.mark.parametrize(
    "name", ["nothing.js", "", "lib", "lib/", "../main.py", "..%2Fmain.py", "%2e%2e/main.py", "lib/../index.html", "/"]
)
def test_nothing_else_is_served(url: str, name: str) -> None:
    """By raw addresses: a client would resolve the dots."""
    with connect(url) as wire:
        status, _, reply = asked(wire, f"GET /page/{name} HTTP/1.1\r\nHost: a\r\n".encode())
    assert (status, reply["error"]["code"]) == (404, "not_found")


def test_the_wheel_has_every_file(tmp_path: Path) -> None:
    """As pip builds it, also in the Dockerfile, which copies the folder app/ whole."""
    with ZipFile(make_wheel_in(ROOT / "pyproject.toml", tmp_path).file) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("app/page/")}
        assert names == {f"app/page/{name}" for name in FILES}
        assert all(wheel.read(f"app/page/{name}") == path.read_bytes() for name, path in FILES.items())


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in FILES.values()) < 200_000
