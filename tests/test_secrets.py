"""No key, right or wrong, in anything that a server writes, wherever its clients put it; none in the engine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import bearer
from tests.parts.waiting import eventually
from tests.parts.wires import connect
from tests.test_main import Served

pytestmark = pytest.mark.slow

ALICE, BOB, ADMIN = ("sk-alice-4242424242", "sk-bob-5353535353", "sk-admin-6464646464")
KNOWN = (ALICE, BOB, ADMIN)
WRONG = "sk-wrong-7575757575"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    models = write_cards(tmp_path / "models")
    file = tmp_path / "keys.toml"
    file.write_text(f'[keys.bob]\nkey = "{BOB}"\n', encoding="utf-8")
    settings = Settings(models=models, devices="cpu", preload="all", port=0, drain=5, log_level="debug")
    keys = {"INSTEP_API_KEYS": f"alice={ALICE}", "instep_admin_key": ADMIN, "INSTEP_API_KEYS_FILE": str(file)}
    with Served(settings, **keys) as served:
        yield served


def everywhere(url: str, key: str) -> Iterator[httpx.Response]:
    """Requests with the key in every place that a client may put it; most are also refused for something else."""
    images = "/v1/images/generations"
    with httpx.Client(base_url=url, headers=bearer(key), timeout=20) as http:
        for path in ("/v1/models", f"/v1/models/{key}", f"/{key}", f"/v1/models?key={key}", "/docs", "/openapi.json"):
            yield http.get(path)
        for path in (f"/healthz?{key}", f"/metrics/{key}", f"/readyz#{key}"):
            yield http.get(path, headers={"X-API-Key": key, "Cookie": f"key={key}", "User-Agent": key})
        for given in (key, f"request-{key}", f"{key}.1"):
            yield http.get("/v1/models", headers={"X-Request-ID": given})
        for prompt in (key, f"!nan {key}", f"!oom {key}", f"!load {key}"):
            yield http.post(images, json={"prompt": prompt, "model": "tiny-text", "user": key})
        for fields in ({"model": key}, {key: 1}, {"size": key}, {"sampler": key}, {"class_label": key}, {"seed": key}):
            yield http.post(images, json={"prompt": key, **fields})
        yield http.post(images, json={"prompt": key, "model": "tiny-text", "stream": True})
        yield http.post(images, content=f'{{"{key}": {key}')
        for path in ("/v1/models/tiny-text/load", f"/v1/models/{key}/unload", f"/v1/models/tiny-text/{key}"):
            yield http.post(path)
        yield http.request("PATCH", "/v1/models")
        yield http.get("/v1/models", headers={"X-Long": key * 3000})
    for value in (f"Basic {key}", key, f"Bearer  {key} {key}"):
        yield httpx.get(f"{url}/v1/models", headers={"Authorization": value, "X-Request-ID": key})


def garbage(url: str, key: str) -> None:
    """Requests that are not HTTP, and one that stops in its middle."""
    for text in (
        f"{key} {key}\r\n\r\n",
        f"GET /{key} HTTP/1.1\r\n{key}\r\n\r\n",
        f"POST /{key} HTTP/1.1\r\nHost: {key}",
    ):
        with connect(url) as wire:
            wire.sendall(text.encode())
            if text.endswith("\n"):
                assert b" 400 " in wire.recv(65536)


def children(pid: int) -> list[Path]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [Path("/proc") / child for file in found for child in file.read_text().split()]


def test_no_key_is_written_or_passed_on(served: Served) -> None:
    url = str(served.logged("listening")["url"])
    eventually(lambda: httpx.get(f"{url}/readyz").status_code == 200)
    statuses = set()
    for key in (*KNOWN, WRONG):
        for reply in everywhere(url, key):
            statuses.add(reply.status_code)
            assert key not in str(reply.headers)
        garbage(url, key)
    for key in KNOWN:
        assert httpx.get(f"{url}/v1/models", headers={"X-Request-ID": key}).headers["x-request-id"] != key
    assert statuses == {200, 202, 400, 401, 403, 404, 405, 431, 500, 503, 507}
    public = httpx.get(f"{url}/metrics").text + httpx.get(f"{url}/openapi.json", headers=bearer(ALICE)).text

    (worker,) = children(served.process.pid)
    passed = (worker / "environ").read_bytes() + (worker / "cmdline").read_bytes()
    assert b"INSTEP_API_KEYS_FILE" in passed

    served.process.send_signal(signal.SIGTERM)
    code, printed = served.ended()
    written = printed + "".join(served.lines)
    assert code == 0 and len(served.lines) > 100
    logged = [json.loads(line) for line in served.lines]
    assert {line.get("key") for line in logged} >= {"alice", "bob", "admin"}
    assert any(line["level"] == "debug" for line in logged)
    for key in (*KNOWN, WRONG):
        assert key not in written and key not in public and key.encode() not in passed
