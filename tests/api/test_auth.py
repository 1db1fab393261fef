"""Keys at the door: every route is closed without one, models are hidden, admin routes are the admin's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route

from app.api.access import ADMIN as ADMIN_ROUTES
from app.api.access import OPEN
from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.errors import SettingsError
from app.keys import ApiKey, Keyring, with_ids
from app.main import create_app
from app.settings import Settings
from tests.api.test_access import lines, log  # noqa: F401
from tests.parts.servers import ADMIN, ALICE, BOB, Server, bearer, generate
from tests.parts.waiting import eventually


def routes(parts: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every (method, path) that an application has, those of plain routes and mounted applications too."""
    for route in iter_route_contexts(parts):
        original = getattr(route, "original_route", route)
        if isinstance(original, Mount):
            yield from routes(original.routes, prefix + original.path)
        else:
            path = prefix + str(getattr(original, "path_format", None) or getattr(route, "path", ""))
            yield from ((method, path) for method in getattr(original, "methods", None) or ["GET"])


def unguarded(app: FastAPI, http: httpx.Client) -> set[str]:
    """Paths that answer anything but 401 to who brings no key."""
    names = {"model": "tiny-text", "name": "start.js", "path": "start.js"}
    asked = [(path, http.request(method, path.format(**names))) for method, path in routes(app.routes)]
    assert all(reply.headers["www-authenticate"] == "Bearer" for _, reply in asked if reply.status_code == 401)
    return {path for path, reply in asked if reply.status_code != 401}


def test_every_route_but_the_open_ones_wants_a_key(closed: Server) -> None:
    known = {path for _, path in routes(closed.app.routes)}
    images = {"/v1/images/generations", "/v1/images/compare"}
    assert known >= {*OPEN, *ADMIN_ROUTES, *images, "/health", "/docs", "/openapi.json", "/v1/models"}
    with httpx.Client(base_url=closed.url) as http:
        assert unguarded(closed.app, http) == OPEN


def test_a_route_beside_the_guard_is_seen(settings: Settings) -> None:
    """Planted: a plain route and a mounted application, which no dependency of FastAPI's covers."""
    app = create_app(settings.model_copy(update={"api_keys": ALICE, "admin_key": ADMIN}))
    app.routes.append(Route("/plain", lambda request: PlainTextResponse("")))
    app.mount("/sub", Starlette(routes=[Route("/deep", lambda request: PlainTextResponse(""))]))
    http = TestClient(app, raise_server_exceptions=False)
    assert unguarded(app, http) == {*OPEN, "/plain", "/sub/deep"}


def test_without_keys_all_but_the_admin_routes_are_open(http: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/models/tiny-text", "/health", "/docs", "/openapi.json"):
        assert http.get(path, headers=bearer("any-key-at-all")).status_code == http.get(path).status_code == 200
    for path in ADMIN_ROUTES:
        for headers in ({}, bearer("x"), bearer(ADMIN)):
            reply = http.post(path.format(model="tiny-text"), headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "not_allowed")


def status(url: str, *headers: bytes, line: bytes = b"GET /v1/models HTTP/1.1") -> int:
    """The status of a request in exactly these bytes."""
    address = urlsplit(url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=10) as wire:
        lines = (line, *(headers if any(h.lower().startswith(b"host") for h in headers) else (b"Host: a", *headers)))
        wire.sendall(b"\r\n".join((*lines, b"Connection: close", b"", b"")))
        return int(wire.makefile("rb").readline().split()[1])


GOOD = b"Authorization: Bearer " + ALICE.encode()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((GOOD,), 200),
        ((GOOD.replace(b"Bearer", b"bEARER"),), 200),
        ((GOOD.replace(b"Authorization", b"AUTHORIZATION"),), 200),
        ((GOOD.replace(b"Bearer ", b"Bearer    ") + b"   ",), 200),
        ((), 401),
        ((GOOD, GOOD), 401),
        ((GOOD, b"Authorization: Bearer wrong"), 401),
        ((b"Authorization: Basic eDp5", GOOD), 401),
        ((GOOD.replace(b"Bearer ", b"Bearer"),), 401),
        ((GOOD.replace(b"Bearer ", b""),), 401),
        ((GOOD.replace(b"Bearer", b"Basic"),), 401),
        ((GOOD.replace(b"Bearer ", b"Bearer Bearer "),), 401),
        ((GOOD + b", Bearer x",), 401),
        ((GOOD + b" x",), 401),
        ((GOOD.upper(),), 401),
        ((GOOD[:-1],), 401),
        ((GOOD + b"\xe4",), 401),
        ((b"Authorization: Bearer \xff\xfe",), 401),
        ((b"Authorization: Bearer",), 401),
        ((b"Authorization:",), 401),
        ((b"Authorization: Bearer " + b"k" * 20_000,), 401),
        ((b"X-API-Key: " + ALICE.encode(),), 401),
        ((b"Cookie: key=" + ALICE.encode(),), 401),
        ((b"Host: a/healthz?",), 401),
        ((b"Host: a/healthz#", b"X-Forwarded-Host: a/metrics", b"X-Original-URL: /healthz"), 401),
        ((b"Upgrade: websocket", b"Connection: Upgrade"), 401),
    ],
)  # fmt: skip
def test_one_bearer_key_opens_and_nothing_else(closed: Server, headers: tuple[bytes, ...], expected: int) -> None:
    assert status(closed.url, *headers) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"GET /v1/models?key=" + ALICE.encode(), 401),
        (b"GET /v1/models/healthz", 401),
        (b"GET /docs", 401),
        (b"GET /openapi.json?path=/healthz", 401),
        (b"GET /v1/../v1/models", 404),
        (b"GET //v1/models", 404),
        (b"GET /v1//models", 404),
        (b"GET /v1/models/", 401),
        (b"GET /healthz/../v1/models", 404),
        (b"GET /healthz/", 404),
        (b"GET /v1%2fmodels", 401),
        (b"GET /%761/models", 401),
        (b"GET /v1/models/%2e%2e%2fhealthz", 401),
        (b"GET /v1/models/a/b/c", 401),
        (b"POST /v1/models/a/b/load", 401),
        (b"GET http://a/v1/models", 404),
        (b"GET http://a/healthz", 404),
        (b"HEAD /v1/models", 401),
        (b"HEAD /v1/models/tiny-text", 401),
        (b"HEAD /docs", 401),
        (b"HEAD /healthz", 200),
        (b"HEAD /v1/images/generations", 405),
        (b"HEAD /nothing", 404),
        (b"OPTIONS /v1/models", 405),
        (b"TRACE /v1/models", 405),
        (b"get /v1/models", 405),
        (b"GET /healthz", 200),
        (b"GET /%68ealthz?x", 200),
    ],
)
def test_odd_paths_and_methods_open_nothing(closed: Server, line: bytes, expected: int) -> None:
    assert status(closed.url, line=line + b" HTTP/1.1") == expected


def test_the_openai_client_sends_what_is_taken(closed: Server) -> None:
    client = openai.OpenAI(base_url=f"{closed.url}/v1", api_key=ALICE, max_retries=0)
    assert client.images.generate(prompt="a", model="tiny-text").data
    with pytest.raises(openai.AuthenticationError, match="does not know this key"):
        openai.OpenAI(base_url=f"{closed.url}/v1", api_key="sk-none").models.list()


def test_a_key_sees_and_uses_the_models_that_it_is_given(closed: Server) -> None:
    with httpx.Client(base_url=closed.url, headers=bearer(BOB)) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny-label"]
        assert http.get("/v1/models/tiny-label").status_code == 200
        assert generate(http, {"class_label": 1, "model": "tiny-label"}).status_code == 200
        assert generate(http, {"class_label": 1}).status_code == 200
    with httpx.Client(base_url=closed.url, headers=bearer(ALICE)) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny-text", "tiny-label"]


@pytest.mark.parametrize(("hidden", "absent"), [("tiny-text", "tiny-texx"), ("gpt-image-1", "gpt-image-9")])
def test_a_model_of_others_is_answered_as_one_that_does_not_exist(closed: Server, hidden: str, absent: str) -> None:
    """The same status, headers and words but for the name, at every route that takes one."""

    def asked(http: httpx.Client, name: str) -> list[httpx.Response]:
        image, stream = {"prompt": "a", "model": name}, {"prompt": "a", "model": name, "stream": True}
        both = {"class_label": 1, "models": ["tiny-label", name]}
        posted = [generate(http, image), generate(http, image, "image/png"), generate(http, stream)]
        posted += [http.post("/v1/images/compare", json=both), http.post(f"/v1/models/{name}/load")]
        return [*posted, *(http.request(method, f"/v1/models/{name}{end}") for method, end in GETS)]

    with httpx.Client(base_url=closed.url, headers=bearer(BOB) | {"X-Request-ID": "one"}) as http:
        pairs = list(zip(asked(http, hidden), asked(http, absent), strict=True))
    for one, other in pairs:
        assert one.status_code == other.status_code == (403 if one.url.path.endswith("load") else 404)
        same = {name: value for name, value in one.headers.items() if name != "date"}
        assert same == {name: value for name, value in other.headers.items() if name != "date"}
        assert one.text.replace(hidden, "NAME") == other.text.replace(absent, "NAME")
        assert "tiny-text" not in one.text.replace(hidden, "NAME")


GETS = [("GET", ""), ("GET", "/classes"), ("HEAD", ""), ("HEAD", "/classes")]


@pytest.mark.parametrize(
    ("headers", "expected", "code"),
    [({}, 401, "invalid_api_key"), (bearer("wrong"), 401, "invalid_api_key"), (bearer(ALICE), 403, "not_allowed")],
)
def test_admin_routes_take_the_admin_key_alone(
    closed: Server, headers: dict[str, str], expected: int, code: str
) -> None:
    for path in ADMIN_ROUTES:
        reply = httpx.post(closed.url + path.format(model="tiny-text"), headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (expected, code)


def test_the_admin_loads_and_unloads(closed: Server) -> None:
    with httpx.Client(base_url=closed.url, headers=bearer(ADMIN)) as http:
        gone = http.post("/v1/models/gpt-image-1/unload")
        assert (gone.status_code, gone.json()["id"]) == (202, "tiny-text")
        eventually(lambda: http.get("/v1/models/tiny-text").json()["state"] == "absent")
        assert http.post("/v1/models/tiny-text/load").status_code == 202
        eventually(lambda: http.get("/v1/models/tiny-text").json()["state"] == "ready")
        for path in ("/v1/models/nope/load", "/v1/models/nope/unload"):
            assert http.post(path).json()["error"]["code"] == "model_not_found"
        assert http.post("/v1/models/tiny-text/load", content=b"\xff{" * 1000).status_code == 202


def test_nothing_is_loaded_where_no_engine_is_alive(settings: Settings) -> None:
    http = TestClient(create_app(settings.model_copy(update={"admin_key": ADMIN})), headers=bearer(ADMIN))
    reply = http.post("/v1/models/tiny-text/load")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_worker")


def test_the_log_tells_who_asked_and_refusals_are_counted(
    closed: Server,
    log: pytest.LogCaptureFixture,  # noqa: F811
) -> None:
    for key in (ALICE, ADMIN, "wrong"):
        httpx.get(f"{closed.url}/v1/models/gpt-image-1", headers=bearer(key))
    told = [{name: line.get(name) for name in ("key", "path", "model", "error")} for line in lines(log, 3)]
    route = {"path": "/v1/models/{model}"}
    assert told == [
        {"key": "alice", "model": "tiny-text", "error": None} | route,
        {"key": "admin", "model": "tiny-text", "error": None} | route,
        {"key": None, "model": None, "error": "invalid_api_key"} | route,
    ]
    metrics = httpx.get(f"{closed.url}/metrics").text
    assert 'instep_requests_rejected_total{model="",reason="invalid_api_key"}' in metrics


def test_models_of_a_key_are_cards(settings: Settings, tmp_path: Path) -> None:
    registry = Registry(read_cards(settings.models), settings)
    ring = with_ids(Keyring((ApiKey("bob", models=frozenset({"gpt-image-1", "tiny-label"})),)), registry)
    assert ring.clients[0].models == {"tiny-text", "tiny-label"}
    with pytest.raises(SettingsError, match=r'keys\.bob\.models: There is no model "tiny-txt"; did you mean'):
        with_ids(Keyring((ApiKey("bob", models=frozenset({"tiny-txt"})),)), registry)
    file = tmp_path / "keys.toml"
    file.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["nope"]', encoding="utf-8")
    with pytest.raises(SettingsError, match=r'keys\.bob\.models: There is no model "nope"'):
        create_app(settings.model_copy(update={"api_keys_file": str(file)}))
