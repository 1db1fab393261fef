"""CORS: off unless it is set; then pages of the origins that are named read every answer, errors and refusals too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from app.errors import SettingsError
from app.main import create_app
from app.settings import Settings
from tests.api.browser import look
from tests.parts.servers import ADMIN, ALICE, Server, bearer
from tests.parts.waiting import eventually
from tests.parts.wires import connect, heard, refusal

ORIGIN, FOREIGN = "https://app.example", "https://evil.example"
IMAGES = "/v1/images/generations"
SMALL = "sk-small-0123456789"
"""A key whose queue holds next to nothing: its second request is a 429."""


@contextmanager
def serving(settings: Settings, folder: Path, **more: object) -> Iterator[Server]:
    """A server with keys and these settings, ready."""
    (folder / "keys.toml").write_text(f'[keys.small]\nkey = "{SMALL}"\nqueue = 0.000001\n', encoding="utf-8")
    keys = {"api_keys": f"alice={ALICE}", "api_keys_file": str(folder / "keys.toml"), "admin_key": ADMIN}
    with Server(settings.model_copy(update={**keys, **more})) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def shared(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Open to the pages of ORIGIN and of another."""
    with serving(settings, tmp_path_factory.mktemp("cors"), cors_origins=f"{ORIGIN}, http://localhost:3000") as one:
        yield one


def preflight(url: str, origin: str = ORIGIN) -> httpx.Response:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.options(f"{url}{IMAGES}", headers={"Origin": origin, **wanted})


def test_it_is_off(closed: Server) -> None:
    assert preflight(closed.url).status_code == 405
    reply = httpx.get(f"{closed.url}/v1/models", headers=bearer(ALICE) | {"Origin": ORIGIN})
    assert reply.status_code == 200 and not [name for name in reply.headers if name.startswith("access-control")]


def test_a_preflight_needs_no_key(shared: Server) -> None:
    reply = preflight(shared.url)
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == ORIGIN
    assert {"authorization", "content-type"} <= set(reply.headers["access-control-allow-headers"].split(","))
    assert {"GET", "HEAD", "POST"} <= set(reply.headers["access-control-allow-methods"].split(", "))
    assert "Origin" in reply.headers["vary"] and "access-control-allow-credentials" not in reply.headers


def test_other_origins_are_told_no(shared: Server) -> None:
    reply = preflight(shared.url, FOREIGN)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "not_allowed")
    assert "access-control-allow-origin" not in reply.headers
    reply = httpx.get(f"{shared.url}/v1/models", headers=bearer(ALICE) | {"Origin": FOREIGN})
    assert reply.status_code == 200 and "access-control-allow-origin" not in reply.headers


def test_all_origins(settings: Settings, tmp_path: Path) -> None:
    with serving(settings, tmp_path, cors_origins="*") as server:
        replies = [preflight(server.url, FOREIGN), httpx.get(f"{server.url}/v1/models", headers={"Origin": "null"})]
    assert [(reply.status_code, reply.headers["access-control-allow-origin"]) for reply in replies] == [
        (200, "*"),
        (401, "*"),
    ]


def test_a_preflight_has_the_limits_of_every_request(shared: Server) -> None:
    """What a proxy may see otherwise is refused, closes the connection, and the page may read why."""
    head = f"OPTIONS {IMAGES} HTTP/1.1\r\nHost: a\r\nOrigin: {ORIGIN}\r\nAccess-Control-Request-Method: POST\r\n"
    for more in ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", "X-A: b\r\n" * 100):
        with connect(shared.url) as wire:
            wire.sendall((head + more + "\r\n").encode())
            told = heard(wire)
        assert refusal(told)[0] in (400, 431) and f"access-control-allow-origin: {ORIGIN}".encode() in told.lower()


def test_options_without_an_origin_is_no_preflight(shared: Server) -> None:
    assert httpx.options(f"{shared.url}{IMAGES}").status_code == 405


def second(http: httpx.Client) -> httpx.Response:
    """The answer to a picture that is asked for while another is drawn."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(http.post, IMAGES, json={"prompt": "!slow 3"})
        eventually(lambda: http.get("/health").json()["running"] > 0)
        refused = http.post(IMAGES, json={"prompt": "a"})
        assert first.result().status_code == 200
    return refused


Asked = Callable[[httpx.Client], httpx.Response]
ANSWERS: dict[str, tuple[int, str, Asked]] = {
    "picture": (200, ALICE, lambda http: http.post(IMAGES, json={"prompt": "a"}, headers={"Accept": "image/png"})),
    "warned": (200, ALICE, lambda http: http.post(IMAGES, json=WARNED, headers={"Accept": "image/png"})),
    "stream": (200, ALICE, lambda http: http.post(IMAGES, json={"prompt": "a", "stream": True})),
    "root": (200, ALICE, lambda http: http.get("/")),
    "page": (200, ALICE, lambda http: http.get("/docs")),
    "head": (200, ALICE, lambda http: http.head("/v1/models")),
    "probe": (200, ALICE, lambda http: http.get("/healthz")),
    "field": (400, ALICE, lambda http: http.post(IMAGES, json={"promt": "a"})),
    "key": (401, "wrong", lambda http: http.get("/v1/models")),
    "admin": (403, ALICE, lambda http: http.post("/v1/models/tiny-text/load")),
    "model": (404, ALICE, lambda http: http.get("/v1/models/nope")),
    "route": (404, ALICE, lambda http: http.get("/nope")),
    "method": (405, ALICE, lambda http: http.delete("/v1/models")),
    "large": (413, ALICE, lambda http: http.post(IMAGES, content=b" " * 2_000_000)),
    "share": (429, SMALL, lambda http: second(http)),
    "headers": (431, ALICE, lambda http: http.get("/v1/models", headers=[("X-A", "b")] * 200)),
    "failed": (500, ALICE, lambda http: http.post(IMAGES, json={"prompt": "!nan"})),
    "load": (503, ALICE, lambda http: http.post(IMAGES, json={"prompt": "!load"})),
    "memory": (507, ALICE, lambda http: http.post(IMAGES, json={"prompt": "!oom"})),
}
WARNED = {"model": "tiny-label", "class_label": 1, "prompt": "ignored"}
SAFE = {"cache-control", "content-length", "content-type", "expires", "last-modified", "pragma"}
"""What every page may read of every answer."""
NOT_FOR_PAGES = {
    *("date", "vary", "connection", "allow", "etag", "x-accel-buffering"),
    *("content-security-policy", "referrer-policy", "x-content-type-options"),
    *("transfer-encoding", "access-control-allow-origin", "access-control-expose-headers"),
}


@pytest.mark.slow
def test_every_answer_is_readable_and_its_headers_too(shared: Server) -> None:
    """And no header of ours is missing from the list because no answer here brought it."""
    met: set[str] = set()
    for name, (status, key, ask) in ANSWERS.items():
        with httpx.Client(base_url=shared.url, headers=bearer(key) | {"Origin": ORIGIN}, timeout=30) as http:
            reply = ask(http)
        assert reply.status_code == status, (name, reply.text)
        assert reply.headers.get_list("access-control-allow-origin") == [ORIGIN], name
        assert "Origin" in reply.headers["vary"], name
        exposed = {word.lower() for word in reply.headers["access-control-expose-headers"].split(", ")}
        assert set(reply.headers) - SAFE - NOT_FOR_PAGES - exposed == set(), name
        met |= set(reply.headers) & exposed
    ours = (
        "retry-after",
        "www-authenticate",
        "x-model",
        "x-request-id",
        "x-seed",
        "x-should-retry",
        "x-warning",
    )
    assert met == exposed == set(ours)


@pytest.mark.slow
def test_a_crowd_is_refused_readably(settings: Settings, tmp_path: Path) -> None:
    """By a page too, which would else see nothing but a network error; and slow ones are."""
    get, post = (
        f"{words} HTTP/1.1\r\nHost: a\r\nOrigin: {ORIGIN}\r\n".encode() for words in ("GET /", f"POST {IMAGES}")
    )
    limits = {"max_connections": 1, "request_timeout": 2.5}
    with serving(settings, tmp_path, cors_origins=ORIGIN, **limits) as server, connect(server.url) as first:
        first.sendall(post + f"Authorization: Bearer {ALICE}\r\nContent-Length: 10\r\n\r\n{{".encode())
        eventually(lambda: len(server.uvicorn.server_state.tasks) == 1)
        with connect(server.url) as other:
            other.sendall(get + b"\r\n")
            over = heard(other).lower()
        late = heard(first).lower()
    for status, said in ((b"503", over), (b"408", late)):
        assert said.startswith(b"http/1.1 " + status)
        assert b"\r\naccess-control-allow-origin: " + ORIGIN.encode() + b"\r\n" in said
        assert b"\r\naccess-control-expose-headers: " in said


PAGE = """<!DOCTYPE html><p id="told">nothing</p><script>
const told = [];
async function ask(path, options) {
  try {
    const reply = await fetch("URL" + path, options);
    const kind = reply.headers.get("content-type");
    const body = kind.startsWith("application/json") ? await reply.json() : (await reply.blob()).type;
    const names = ["x-request-id", "x-seed", "retry-after"].filter((name) => reply.headers.get(name));
    told.push([reply.status, names, body.error ? body.error.code : body]);
  } catch (error) { told.push(String(error)); }
}
(async () => {
  const headers = { Authorization: "Bearer KEY", "Content-Type": "application/json", Accept: "image/png" };
  await ask("/v1/images/generations", { method: "POST", headers, body: JSON.stringify({ prompt: "a" }) });
  await ask("/v1/models", {});
  await ask("/v1/models/nope", { headers });
  document.getElementById("told").textContent = JSON.stringify(told);
})();
</script>"""


class Page(BaseHTTPRequestHandler):
    """The one page of another server; it asks `url`."""

    url = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.replace("URL", Page.url).replace("KEY", ALICE).encode())

    def log_message(self, format: str, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def origin() -> Iterator[str]:
    """Where the page is."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


READ = [
    [200, ["x-request-id", "x-seed"], "image/png"],
    [401, ["x-request-id"], "invalid_api_key"],
    [404, ["x-request-id"], "model_not_found"],
]


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "told"), [("{origin}", READ), (ORIGIN, ["TypeError: Failed to fetch"] * 3)])
def test_a_page_of_another_origin_in_a_browser(
    settings: Settings, tmp_path: Path, origin: str, setting: str, told: list[object]
) -> None:
    """A real preflight with a key's header, a picture and two errors, as a page reads them or does not."""
    with serving(settings, tmp_path, cors_origins=setting.format(origin=origin)) as server:
        Page.url = server.url
        seen = look(origin, tmp_path / "browser")
    (found,) = re.findall(r'<p id="told">(.*?)</p>', seen.html)
    assert json.loads(found) == told


@pytest.mark.parametrize(
    "origin",
    [
        "app.example",
        "https://app.example/",
        "https://app.example/x",
        "HTTPS://App.example",
        "https://*.example",
        "ws://a",
    ],
)
def test_an_origin_that_no_browser_sends_stops_the_start(settings: Settings, origin: str) -> None:
    with pytest.raises(SettingsError, match=r"cors_origins: .*an origin is scheme://host") as caught:
        create_app(settings.model_copy(update={"cors_origins": f"{ORIGIN},{origin}"}))
    assert caught.value.param == "cors_origins"
