"""Bodies that bring a picture: their limits, what they leave behind, and the processes that read them."""

from __future__ import annotations

import asyncio
import base64
import http.client
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from anyio import CapacityLimiter

from app.api.front import BODY_LIMITS, Front
from app.api.uploads import typed_fields
from app.errors import InvalidValue, Unavailable
from app.jobs.edit import EditBody
from app.settings import Settings
from tests.api.test_edits import IMAGE
from tests.parts.servers import ALICE, Server
from tests.parts.waiting import eventually
from tests.parts.wires import connect, heard, refusal

EDITS = "/v1/images/edits"
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def uploads(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with room for 8 MB of uploads and 2 seconds for each, whose uploads are in a folder of its own."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("uploads"))
    changed = {"upload_memory": 8 * MEGABYTE, "request_timeout": 2.0}
    try:
        with Server(settings.model_copy(update=changed)) as server:
            yield server.ready()
    finally:
        tempfile.tempdir = before


@pytest.fixture(autouse=True)
def leaves_nothing(uploads: Server) -> Iterator[None]:
    """Whatever a test sends, its bytes are not counted any more, and its files are gone."""
    yield
    front: Front = uploads.app.state.front
    eventually(lambda: front.uploads.total() == 0 and not os.listdir(str(tempfile.tempdir)))


@pytest.fixture
def client(uploads: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=uploads.url, timeout=60) as client:
        yield client


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def readers() -> list[int]:
    """Processes of this one that read uploads."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()) and b"anyio.to_process" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def pieces(size: int) -> Iterator[bytes]:
    return (bytes(65536) for _ in range(size // 65536))


def test_no_process_reads_before_there_is_an_upload(client: httpx.Client, uploads: Server) -> None:
    before = readers()
    assert client.post("/v1/images/generations", json={"prompt": "a"}).status_code == 200
    assert client.post(EDITS, content=b"a", headers={"Content-Type": "text/plain"}).status_code == 400
    assert readers() == before
    assert client.post(EDITS, files={"image": IMAGE}, data={"prompt": "a"}).status_code == 200
    assert len(readers()) == len(before) + 1


@pytest.mark.parametrize("kind", ["text/plain", "image/png", "application/x-www-form-urlencoded", "multipart/mixed"])
def test_another_content_type_is_an_error_that_names_both(client: httpx.Client, kind: str) -> None:
    reply = client.post(EDITS, content=IMAGE, headers={"Content-Type": kind})
    assert code(reply) == (400, "invalid_request")
    assert "multipart/form-data" in reply.text and "application/json" in reply.text


def test_a_content_encoding_is_not_decoded(client: httpx.Client) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    assert code(client.post(EDITS, content=b"{}", headers=headers)) == (415, "unsupported_encoding")


def test_the_limit_of_a_body_is_the_route_s(client: httpx.Client) -> None:
    assert set(BODY_LIMITS) == {EDITS, "/v1/images/variations"} and set(BODY_LIMITS.values()) == {32 * MEGABYTE}
    large = {"Content-Length": str(33 * MEGABYTE), "Content-Type": "application/json"}
    for path, size, status in (
        ("/v1/images/generations", 2 * MEGABYTE, 413),
        ("/v1/images/compare", 2 * MEGABYTE, 413),
        (EDITS, 2 * MEGABYTE, 400),
    ):
        for content in (bytes(size), pieces(size)):
            reply = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert reply.status_code == status, path
    wire = http.client.HTTPConnection(client.base_url.netloc.decode(), timeout=20)
    wire.request("POST", EDITS, headers=large)
    assert wire.getresponse().status == 413  # by its length alone
    wire.close()


@pytest.mark.parametrize("content", [bytes(9 * MEGABYTE), None], ids=["a length", "chunks"])
def test_all_uploads_together_have_a_bound(client: httpx.Client, content: bytes | None) -> None:
    reply = client.post(EDITS, content=content or pieces(9 * MEGABYTE), headers={"Content-Type": "application/json"})
    assert code(reply) == (503, "overloaded")
    assert 1 <= int(reply.headers["retry-after"]) <= 10 and reply.headers["x-should-retry"] == "true"
    assert client.post(EDITS, files={"image": IMAGE}, data={"prompt": "a"}).status_code == 200


def test_a_folder_that_is_gone_is_no_room(client: httpx.Client) -> None:
    """Or one that may not be written, or is full."""
    folder = Path(str(tempfile.tempdir))
    folder.rename(folder.with_name("away"))
    try:
        reply = client.post(EDITS, files={"image": IMAGE}, data={"prompt": "a"})
        assert code(reply) == (503, "overloaded") and "No such file" in reply.text
    finally:
        folder.with_name("away").rename(folder)


def test_what_has_come_counts_and_not_what_is_declared(client: httpx.Client, uploads: Server) -> None:
    head = f"POST {EDITS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with connect(uploads.url) as slow:
        slow.sendall(f"{head}Content-Length: {7 * MEGABYTE + 1}\r\n\r\n".encode())
        reply = client.post(EDITS, content=bytes(7 * MEGABYTE), headers={"Content-Type": "application/json"})
        assert code(reply) == (400, "invalid_json")
        slow.sendall(bytes(7 * MEGABYTE))
        eventually(lambda: uploads.app.state.front.uploads.total() == 7 * MEGABYTE)
        assert code(client.post(EDITS, content=bytes(2 * MEGABYTE), headers={"Content-Type": "application/json"})) == (
            503, "overloaded",
        )  # fmt: skip
        assert client.post(EDITS, files={"image": IMAGE}, data={"prompt": "a"}).status_code == 200


@pytest.mark.slow
def test_a_client_has_the_time_of_any_request(uploads: Server) -> None:
    head = f"POST {EDITS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    with connect(uploads.url) as slow:
        slow.sendall(head.encode())
        assert refusal(heard(slow)) == (408, "request_timeout")


def test_a_part_over_a_megabyte_is_taken(client: httpx.Client) -> None:
    """A PNG may end in anything."""
    large = IMAGE + bytes(3 * MEGABYTE)
    assert client.post(EDITS, files={"image": large}, data={"prompt": "a"}).status_code == 200
    coded = base64.b64encode(large).decode()
    assert client.post(EDITS, json={"prompt": "a", "image": coded}).status_code == 200


def test_text_of_a_form_has_the_types_of_the_body() -> None:
    typed = typed_fields(EditBody)
    assert {"n", "stream", "strength", "overlay", "grid", "class_label", "seed", "deadline"} <= typed
    assert typed.isdisjoint({"prompt", "negative_prompt", "model", "size", "sampler", "user", "quality", "resize"})


def alone(uploads: Server, **settings: object) -> Front:
    """The front of the server with processes of its own, for an event loop of the test's."""
    front: Front = uploads.app.state.front
    settings = {"request_timeout": 30.0, **settings}
    return replace(front, readers=CapacityLimiter(2), settings=front.settings.model_copy(update=settings))


@pytest.mark.parametrize("end", [os._exit, pytest.param(os.abort, marks=pytest.mark.slow)], ids=["exit", "signal"])
def test_a_process_that_a_file_ends_is_that_file_s_error_alone(uploads: Server, end: Callable[..., object]) -> None:
    front = alone(uploads)

    async def two() -> int:
        with pytest.raises(InvalidValue, match="image: cannot be read"):
            await front.in_process(end, *([3] if end is os._exit else []))
        return await front.in_process(abs, -7)

    assert asyncio.run(two()) == 7


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended(uploads: Server) -> None:
    front = alone(uploads, request_timeout=3.0)

    async def slow() -> list[int]:
        await front.in_process(abs, 0)
        assert len(readers()) >= 1
        with pytest.raises(Unavailable, match="no time"):
            await front.in_process(time.sleep, 60)
        return readers()

    before = readers()
    assert set(asyncio.run(slow())) <= set(before)


def test_a_dead_process_is_replaced(client: httpx.Client, uploads: Server) -> None:
    assert client.post(EDITS, files={"image": IMAGE}, data={"prompt": "a"}).status_code == 200
    for process in readers():
        os.kill(process, 9)
    eventually(lambda: not readers())
    assert client.post(EDITS, files={"image": IMAGE}, data={"prompt": "a"}).status_code == 200


def test_a_closed_server_wants_the_key_before_the_picture(closed: Server) -> None:
    assert httpx.post(f"{closed.url}{EDITS}", files={"image": IMAGE}).status_code == 401
    headers = {"Authorization": f"Bearer {ALICE}"}
    reply = httpx.post(
        f"{closed.url}{EDITS}", files={"image": IMAGE}, data={"prompt": "a"}, headers=headers, timeout=30
    )
    assert reply.status_code == 200
