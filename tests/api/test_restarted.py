"""An engine process dies behind a whole server: requests and streams go on, a poison is one 500, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from base64 import b64decode
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from app.request import Prompt
from app.settings import Settings
from app.worker import child
from tests.api.streams import events, kinds, of_each
from tests.api.test_access import lines, log  # noqa: F401
from tests.parts.fake_worker import colour
from tests.parts.servers import Server, generate
from tests.parts.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture(params=[1.0])
def own(settings: Settings, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of its own, whose first restart comes after so many seconds."""
    monkeypatch.setattr(child, "FIRST_DELAY", request.param)
    with Server(settings) as server:
        yield server.ready()


patient = pytest.mark.parametrize("own", [4.0], indirect=True)


def kill(server: Server) -> None:
    """Kill the engine process, and wait until the server has noticed."""
    (pid,) = server.supervisor.pids
    assert pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not server.supervisor.live and not server.supervisor.pids[0])


def sample(server: Server, name: str, **labels: str) -> float:
    words = ",".join(f'{label}="{value}"' for label, value in labels.items())
    text = httpx.get(f"{server.url}/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith(f"instep_{name}{{{words}}} ")]
    return float(line.rpartition(" ")[2])


def waiting(server: Server) -> tuple[float, float, float]:
    """Images of tiny-text that wait for the engine, and in the queue, and both."""
    model = "tiny-text"
    by_reason = [
        sample(server, "num_requests_waiting_by_reason", model=model, reason=reason) for reason in ("engine", "queue")
    ]
    return by_reason[0], by_reason[1], sample(server, "num_requests_waiting", model=model)


def ask(pool: ThreadPoolExecutor, server: Server, accept: str = "*/*", **body: Any) -> Future[httpx.Response]:
    url = f"{server.url}/v1/images/generations"
    return pool.submit(httpx.post, url, json={"model": "tiny-text", **body}, headers={"Accept": accept}, timeout=60)


def blocks(reply: httpx.Response) -> list[str]:
    """Each comment of a stream but the pings, each event as its type, or as the code of its error."""
    found = []
    for block in reply.text.strip().split("\n\n"):
        if block.startswith(":"):
            found += [block] * (block != ": ping")
        else:
            data = json.loads(block.partition("data: ")[2])
            found.append(data["error"]["code"] if "error" in data else data["type"].partition(".")[2])
    return found


def pixel(data: bytes) -> object:
    return Image.open(BytesIO(data)).convert("RGB").getpixel((0, 0))


def test_all_that_was_accepted_is_answered_and_a_probe_says_not_ready(own: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        whole = ask(pool, own, prompt="!slow 1", n=2, seed=1)
        file = ask(pool, own, "image/png", prompt="!slow 1 file", seed=3)
        stream = ask(pool, own, prompt="!slow 1 stream", seed=4, stream=True)
        eventually(lambda: own.supervisor.running == 4)
        kill(own)
        assert httpx.get(f"{own.url}/readyz").status_code == 503
        assert httpx.get(f"{own.url}/healthz").status_code == 200
        late = ask(pool, own, prompt="late", seed=5)
        eventually(lambda: waiting(own) == (5, 0, 5))
        assert sample(own, "num_requests_running", model="tiny-text") == 0
        replies = [each.result() for each in (whole, file, stream, late)]
    assert [reply.status_code for reply in replies] == [200] * 4
    data = [b64decode(one["b64_json"]) for one in replies[0].json()["data"]]
    assert [pixel(one) for one in data] == [colour(Prompt("!slow 1"), seed) for seed in (1, 2)]
    assert pixel(replies[1].content) == colour(Prompt("!slow 1 file"), 3)
    assert blocks(replies[2]) == [": restarted", "completed"]
    assert waiting(own) == (0, 0, 0) and sample(own, "requests_replayed_total", model="tiny-text") == 3
    assert sample(own, "images_total", model="tiny-text") == 5
    assert sample(own, "requests_total", model="tiny-text", outcome="answered") == 4
    assert httpx.get(f"{own.url}/readyz").status_code == 200


def test_a_stream_goes_on_after_its_previews_with_one_picture_each(own: Server) -> None:
    """Of two images the first is complete when the process dies: it does not come again."""
    body = {"prompt": ["a cat", "!slow 1.5"], "seed": 1, "partial_images": 3, "num_inference_steps": 8}
    with ThreadPoolExecutor(1) as pool:
        future = ask(pool, own, stream=True, **body)
        eventually(lambda: own.supervisor.images("tiny-text")[1] == 1)
        kill(own)
        reply = future.result()
    found = blocks(reply)
    at = found.index(": restarted")
    assert found.count(": restarted") == 1 and found[:at].count("completed") == 1
    assert found[at + 1 :] == ["partial_image"] * 3 + ["completed"]
    events = [
        json.loads(block.partition("data: ")[2]) for block in reply.text.strip().split("\n\n") if "data: " in block
    ]
    done = {event["image_index"]: event for event in events if event["type"].endswith("completed")}
    assert {index: pixel(b64decode(event["b64_json"])) for index, event in done.items()} == {
        0: colour(Prompt("a cat"), 1),
        1: colour(Prompt("!slow 1.5"), 2),
    }
    after = [event for event in events if event["type"].endswith("partial_image")][-3:]
    assert [(event["image_index"], event["partial_image_index"]) for event in after] == [(1, 0), (1, 1), (1, 2)]


def test_steps_begin_again_with_each_request_of_a_batch(own: Server) -> None:
    """After the comment, from 1, for the images that are left alone: each picture comes once."""
    slow = {"prompt": "!slow 1.5", "model": "tiny-text", "num_inference_steps": 20, "progress": True}
    body = {"requests": [{**slow, "prompt": "a cat"}, slow, {**slow, "seed": 3}]}
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(httpx.post, f"{own.url}/v1/images/batch", json=body, timeout=60)
        eventually(lambda: own.supervisor.images("tiny-text")[1] == 2)
        kill(own)
        text = future.result().text
    before, after = text.split(": restarted\n\n", 1)
    assert after.count(": restarted\n\n") == 1 and text.count(".accepted\n") == 3
    early, late = of_each(events(before), 3), of_each(events(after), 3)
    assert kinds(early[0])[-1] == "completed" and late[0] == []
    for request in (1, 2):
        steps = [event["step"] for event in early[request] if event["type"].endswith("progress")]
        assert steps == [*range(1, len(steps) + 1)] and len(steps) < 20
        assert kinds(late[request]) == [*["progress"] * 20, "completed"]
        assert [event["step"] for event in late[request][:-1]] == [*range(1, 21)]
    assert pixel(b64decode(late[2][-1]["b64_json"])) == colour(Prompt("!slow 1.5"), 3)


def test_the_openai_client_reads_over_the_comment(own: Server) -> None:
    client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0)
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(
            lambda: list(client.images.generate(prompt="!slow 1", stream=True, partial_images=1, model="tiny-text"))
        )
        eventually(lambda: own.supervisor.running)
        kill(own)
        events = drawn.result(60)
    *partials, last = (event.type for event in events)
    assert last == "image_generation.completed" and set(partials) == {"image_generation.partial_image"}


def test_a_sheet_waits_for_the_images_that_were_left(own: Server) -> None:
    body = {"prompt": ["a cat", "!slow 1"], "grid": {"columns": 2}, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        future = ask(pool, own, **body)
        eventually(lambda: own.supervisor.images("tiny-text")[1] == 1)
        kill(own)
        assert blocks(future.result()) == [": restarted", "completed"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_poison_is_one_500_that_no_client_sends_again(
    own: Server, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(child, "LAST_DELAY", 0.1)
    client = openai.OpenAI(base_url=f"{own.url}/v1", api_key="none")
    with ThreadPoolExecutor(2) as pool:
        beside = ask(pool, own, prompt="!slow 1.5")
        eventually(lambda: own.supervisor.running)
        poison = ask(pool, own, prompt="!die", seed=1, stream=stream).result()
        assert beside.result().status_code == 200
    if stream:
        assert (poison.status_code, blocks(poison)) == (200, [": restarted", "crashed"])
    else:
        error = poison.json()["error"]
        assert (poison.status_code, error["code"], error["type"]) == (500, "crashed", "server_error")
        assert poison.headers["x-should-retry"] == "false" and "retry-after" not in poison.headers
    restarts = own.supervisor.restarts
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="!die", model="tiny-text", extra_body={"seed": 2})
    assert (caught.value.code, caught.value.response.headers["x-should-retry"]) == ("crashed", "false")
    eventually(lambda: own.supervisor.live)
    assert own.supervisor.restarts - restarts <= 1, "the twin was not tried"
    assert sample(own, "requests_failed_total", model="tiny-text", reason="crashed") == 1
    assert sample(own, "requests_rejected_total", model="tiny-text", reason="crashed") == 1


@patient
def test_a_deadline_that_passes_while_no_engine_lives_is_504(own: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        early, late = (ask(pool, own, prompt="!slow 2", deadline=seconds) for seconds in (3, 60))
        eventually(lambda: own.supervisor.running == 2)
        kill(own)
        reply = early.result()
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "no engine process" in reply.json()["error"]["message"]
        assert late.result().status_code == 200


@patient
def test_a_client_that_leaves_meanwhile_is_not_drawn_for(own: Server) -> None:
    body = {"prompt": "!slow 9", "model": "tiny-text"}
    with ThreadPoolExecutor(1) as pool:
        gone = pool.submit(httpx.post, f"{own.url}/v1/images/generations", json=body, timeout=2)
        eventually(lambda: own.supervisor.running)
        kill(own)
        assert own.supervisor.stranded("tiny-text") == 1
        with pytest.raises(httpx.ReadTimeout):
            gone.result()
    eventually(lambda: own.supervisor.stranded("tiny-text") == 0)
    eventually(lambda: own.supervisor.live)
    assert sample(own, "requests_replayed_total", model="tiny-text") == 0
    assert sample(own, "requests_total", model="tiny-text", outcome="cancelled") == 1


def test_full_memory_is_503_and_free_again_when_requests_end(settings: Settings) -> None:
    body = {"prompt": ["!slow 1 " + 180 * "x" for _ in range(4)]}
    with Server(settings.model_copy(update={"request_memory": 2_900})) as server:
        server.ready()
        with ThreadPoolExecutor(3) as pool:
            kept = [ask(pool, server, **body) for _ in range(2)]
            eventually(lambda: server.supervisor.running == 8)
            refused = ask(pool, server, **body).result()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert "INSTEP_REQUEST_MEMORY" in refused.json()["error"]["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 2 and refused.headers["x-should-retry"] == "true"
            assert ask(pool, server, prompt="a").result().status_code == 200
            assert [each.result().status_code for each in kept] == [200, 200]
            assert ask(pool, server, **body).result().status_code == 200
        assert sample(server, "requests_rejected_total", model="tiny-text", reason="overloaded") == 1


def test_a_line_of_the_log_says_how_often_it_began_again(
    own: Server,
    log: pytest.LogCaptureFixture,  # noqa: F811
) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = ask(pool, own, prompt="!slow 0.5")
        eventually(lambda: own.supervisor.running)
        kill(own)
        assert future.result().status_code == 200
    with httpx.Client(base_url=own.url) as http:
        assert generate(http, {"prompt": "calm", "model": "tiny-text"}).status_code == 200
    told: list[Any] = []

    def logged() -> bool:
        told[:] = [line for line in lines(log) if line.get("path") == "/v1/images/generations"]
        return len(told) == 2

    eventually(logged)
    assert [line.get("restarts") for line in told] == [1, None]
