"""What one client costs the others: lengths come first, answers are made once, requests take turns."""

from __future__ import annotations

import asyncio
import difflib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastapi_swagger  # type: ignore[import-untyped]
import httpx
import pytest

from app.api import docs
from app.api.access import SLICE
from app.api.front import Front
from app.api.guard import AHEAD, READ, READ_BODY, READ_CHUNKS, Guarded
from app.cards.catalog import COMPARED, did_you_mean
from app.cards.folder import ModelFolder
from app.jobs.fields import LONGEST, MOST
from app.main import SWITCH
from app.settings import Settings
from tests.parts.servers import Server, generate
from tests.parts.waiting import eventually
from tests.parts.wires import connect, heard
from tests.parts.workers import FAKE

SURROGATE = "\ud800"
CROWD = 20
MODELS = Path(__file__).parents[2] / "models"
STEADY = """
import gc, signal, sys
from functools import partial
from app import main
from app.settings import Settings

def greet(*_):
    print(round(sys.getswitchinterval(), 6), gc.get_freeze_count() > 10_000)
    signal.raise_signal(signal.SIGTERM)

main.greet = greet
main.Supervisor = partial(main.Supervisor, command=sys.argv[2:])
main.serve(Settings.model_validate_json(sys.argv[1]))
"""
"""A server that says how its interpreter is set once it has started, and ends."""


def counted(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[Any]:
    """The first arguments of the calls of a function, from now on."""
    calls: list[Any] = []
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *given: calls.append(given[0] if given else None) or real(*given))
    return calls


def bare() -> Front:
    """What requests wait in line for, without a server."""
    nothing: Any = None
    return Front(nothing, nothing, nothing, nothing, nothing, nothing)


def at_once(url: str, path: str) -> list[httpx.Response]:
    """The answers to a crowd that asks for one thing."""
    with ThreadPoolExecutor(CROWD) as pool:
        return list(pool.map(lambda _: httpx.get(f"{url}{path}", timeout=30), range(CROWD)))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a" * (LONGEST + 1)}, f"prompt: expects at most {LONGEST} characters"),
        ({"prompt": "a", "negative_prompt": "a" * (LONGEST + 1)}, "negative_prompt: expects at most"),
        ({"prompt": "a", "model": "a" * (LONGEST + 1)}, "model: expects at most"),
        ({"prompt": "a", "sampler": "a" * (LONGEST + 1)}, "sampler: expects at most"),
        ({"prompt": ["a"] * (MOST + 1)}, f"prompt: expects at most {MOST} entries, not {MOST + 1}"),
        ({"class_label": ["a"] * (MOST + 1)}, "class_label: expects at most"),
        ({"prompt": SURROGATE}, "prompt: has a lone surrogate"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_text_or_list_that_is_too_long_says_so(http: httpx.Client, body: dict[str, Any], said: str) -> None:
    reply = http.post("/v1/images/generations", content=json.dumps(body).encode())
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(said), reply.text


def test_a_comparison_has_its_lengths_checked_first(http: httpx.Client) -> None:
    body = json.dumps({"models": ["a"] * (MOST + 1), "prompt": "a"}).encode()
    assert "at most 8 entries" in http.post("/v1/images/compare", content=body).json()["error"]["message"]


def test_few_names_are_compared_letter_by_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{kind} {number:03}" for kind in ("retriever", "terrier", "spaniel") for number in range(400)]
    compared: list[int] = []
    real = difflib.get_close_matches

    def watched(word: str, among: list[str], **rest: Any) -> list[str]:
        compared.append(len(among))
        return real(word, among, **rest)

    monkeypatch.setattr(difflib, "get_close_matches", watched)
    assert did_you_mean("retreiver 17", [*names, "golden retriever"], most=3).startswith('; did you mean "retriever ')
    assert did_you_mean("goldn retreiver", [*names, "golden retriever"]) == '; did you mean "golden retriever"?'
    assert did_you_mean("x" * 1_000_000, names) == ""
    assert len(compared) == 3 and max(compared) <= COMPARED


def test_the_document_is_made_once(server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch, docs, "document")
    server.app.state.front.documents.clear()
    replies = at_once(url, "/openapi.json") + at_once(url, "/openapi.json")
    assert len(made) == 1
    assert {reply.content for reply in replies} == {replies[0].content} and replies[0].json()["openapi"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny-text", "/metrics"])
def test_a_crowd_shares_one_answer(server: Server, url: str, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """While one is made, all others wait for one more, so that nobody gets what is older than the question."""
    made: list[None] = []

    def slowly(real: Callable[..., Any]) -> Callable[..., Any]:
        def work(*given: Any) -> Any:
            made.append(None)
            eventually(lambda: len(asked) == CROWD, 30)
            return real(*given)

        return work

    asked = counted(monkeypatch, Front, "shared")
    monkeypatch.setattr(ModelFolder, "fault", slowly(ModelFolder.fault))
    monkeypatch.setattr(server.metrics, "text", slowly(server.metrics.text))
    assert {reply.status_code for reply in at_once(url, path)} == {200}
    assert len(made) <= 2 * (1 if path == "/metrics" else len(server.app.state.front.registry.cards))


def test_a_shared_result_is_never_older_than_the_question() -> None:
    async def scene() -> None:
        front, started, go = bare(), [0], asyncio.Event()

        async def make() -> int:
            started[0] += 1
            mine = started[0]
            await go.wait()
            return mine

        first = [asyncio.ensure_future(front.shared("a", make)) for _ in range(3)]
        await asyncio.sleep(0.01)
        later = [asyncio.ensure_future(front.shared("a", make)) for _ in range(3)]
        other = asyncio.ensure_future(front.shared("b", make))
        await asyncio.sleep(0.01)
        later[0].cancel()  # one who leaves takes nothing from the others
        go.set()
        assert await asyncio.gather(*first) == [1, 1, 1] and await other == 2
        assert await asyncio.gather(*later[1:]) == [3, 3]

    asyncio.run(scene())


@pytest.mark.slow
def test_a_server_that_has_started_is_steady(settings: Settings) -> None:
    words = [sys.executable, "-c", STEADY, settings.model_dump_json(exclude_unset=True), *FAKE]
    done = subprocess.run(words, cwd=MODELS.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{SWITCH} True\n"), done.stderr


def test_one_request_goes_on_in_a_turn_of_the_loop() -> None:
    async def scene() -> None:
        front, log = bare(), list[str]()

        async def client(number: int) -> None:
            await front.turn()
            log.append(str(number))

        async def loop() -> None:
            while len([entry for entry in log if entry != "-"]) < 5:
                await asyncio.sleep(0)
                log.append("-")

        await asyncio.gather(loop(), *(client(number) for number in range(5)))
        words = "".join(log)
        assert [letter for letter in words if letter != "-"] == list("01234"), words
        assert all(f"{number}{number + 1}" not in words for number in range(4)), words

    asyncio.run(scene())


def test_probes_do_not_wait_but_pipelined_ones_do(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted(monkeypatch, Front, "turn")
    ask = b"GET /healthz HTTP/1.1\r\nHost: a\r\n%s\r\n"
    with connect(url) as wire:
        wire.sendall(2 * (ask % b"") + ask % b"Connection: close\r\n")
        assert heard(wire).count(b"HTTP/1.1 200") == 3 and len(taken) == 2
    for path, waits in (("/health", 0), ("/healthz", 0), ("/readyz", 0), ("/docs", 1)):
        taken.clear()
        assert httpx.get(f"{url}{path}").status_code == 200
        assert len(taken) == waits


def test_a_long_answer_is_sent_in_slices_and_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files(fastapi_swagger).joinpath("resources", "swagger-ui-bundle.js").read_bytes()
    assert len(whole) > 2 * SLICE
    taken = counted(monkeypatch, Front, "turn")
    reply = httpx.get(f"{url}/docs/swagger-ui-bundle.js")
    assert reply.content == whole and len(taken) == 1 + (len(whole) - 1) // SLICE
    assert httpx.head(f"{url}/docs/swagger-ui-bundle.js").headers["content-length"] == str(len(whole))


def test_a_body_in_chunks_of_a_byte_is_parsed_over_many_turns(
    http: httpx.Client, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, Guarded, "buffer_updated")
    body = json.dumps({"prompt": "a" * 150, "user": "b" * 5000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(url) as wire:
        wire.sendall(head + chunks + b"0\r\n\r\n")
        said = b"".join(iter(lambda: wire.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 200 ") and len(calls) >= (len(head + chunks) - READ) // READ_CHUNKS
    assert generate(http, {"prompt": "a"}).status_code == 200


@pytest.mark.slow
def test_pipelined_requests_are_not_read_without_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the first ones are answered they stay with the client, and then all are answered, in order."""
    ahead: list[int] = []
    real = Guarded.data_received

    def watched(connection: Guarded, data: bytes) -> None:
        real(connection, data)
        ahead.append(len(connection.conn.trailing_data[0]))

    monkeypatch.setattr(Guarded, "data_received", watched)
    body = json.dumps({"prompt": "a", "n": 0, "user": "b" * 400}).encode()
    ask = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n" + body
    whole = ask % (b"", len(body)) * 1999 + ask % (b"Connection: close\r\n", len(body))

    def client(_: int) -> int:
        with connect(url) as wire, ThreadPoolExecutor(1) as sender:
            sender.submit(wire.sendall, whole)
            return b"".join(iter(lambda: wire.recv(65536), b"")).count(b"HTTP/1.1 400")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(client, range(4))) == [2000] * 4
    assert max(ahead) <= AHEAD + READ_BODY


@pytest.mark.slow
def test_health_is_answered_while_a_crowd_pipelines() -> None:
    """The document of all shipped cards; ten times what `python -m tests.bench.loop` finds."""
    with Server(Settings(models=MODELS, devices="cpu", port=0, drain=0, connections_per_address=0)) as server:
        url = server.url
        stop, ask = threading.Event(), b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 10

        def client(_: int) -> None:
            with connect(url) as wire, suppress(OSError):
                while not stop.is_set():
                    wire.sendall(ask)
                    wire.recv(1_000_000)

        with ThreadPoolExecutor(100) as pool, httpx.Client(base_url=url, timeout=30) as http:
            for number in range(100):
                pool.submit(client, number)
            time.sleep(1)
            waits = []
            for _ in range(9):
                begun = time.perf_counter()
                assert http.get("/health").status_code == 200
                waits.append(time.perf_counter() - begun)
            stop.set()
        assert sorted(waits)[4] < 0.5, waits
