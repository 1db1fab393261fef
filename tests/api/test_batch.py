"""Batches: several requests in one stream, each as if it had come alone."""

from __future__ import annotations

import gc
import re
from typing import Any

import httpx
import openai
import pytest

from app.jobs.job import Job
from app.report import Result
from app.request import ClassLabel, Prompt
from tests.api.streams import batch, events, kinds, of_each, pixel, read
from tests.api.test_access import lines, log  # noqa: F401
from tests.api.test_compare import grown, outcomes
from tests.api.test_openapi import checker_of
from tests.parts.fake_worker import colour
from tests.parts.servers import BOB, Server, bearer
from tests.parts.waiting import eventually

SLOW = {"prompt": "!slow 60", "num_inference_steps": 50, "progress": True}


def idle(server: Server) -> bool:
    return server.supervisor.running + server.supervisor.waiting == 0


def test_each_request_is_answered_as_if_it_had_come_alone(http: httpx.Client) -> None:
    """Other models, formats, steps and sheets in one stream; only who asks for progress gets it."""
    reply = batch(
        http,
        {"prompt": "a", "seed": 5},
        {"prompt": ["b", "c"], "seed": 6, "num_inference_steps": 2, "progress": True, "partial_images": 1},
        {"model": "tiny-label", "class_label": "goldfish", "seed": 7, "output_format": "webp"},
        {"prompt": "d", "n": 4, "grid": {"columns": 2}, "seed": 8, "stream": False},
    )
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    found = of_each(events(reply.text), 4)
    assert [kinds(one) for one in (found[0], found[2], found[3])] == [["completed"]] * 3
    assert sorted(kinds(found[1])) == ["accepted", *["completed"] * 2, *["partial_image"] * 2, *["progress"] * 4]
    assert kinds(found[1])[0] == "accepted"
    done = {event["image_index"]: event for event in found[1] if event["type"].endswith("completed")}
    assert [pixel(done[index]) for index in (0, 1)] == [colour(Prompt("b"), 6), colour(Prompt("c"), 7)]
    assert pixel(found[0][0]) == colour(Prompt("a"), 5)
    assert pixel(found[2][0]) is not None and found[2][0]["output_format"] == "webp"
    assert (found[2][0]["class_label"], found[2][0]["revised_prompt"]) == (1, "goldfish")
    assert (found[3][0]["size"], pixel(found[3][0])) == ("64x64", colour(Prompt("d"), 8))
    assert colour(Prompt("a"), 5) != colour(ClassLabel(1), 7)


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 400, "requests", "is required"),
        ({"requests": []}, 400, "requests", "1 to 16"),
        ({"requests": [{"prompt": "a"}] * 17}, 400, "requests", "at most 16 entries, not 17"),
        ({"requests": {"prompt": "a"}}, 400, "requests", "1 to 16"),
        ({"requests": [{"prompt": "a"}], "model": "tiny-text"}, 400, "model", "Unknown field"),
        ([{"prompt": "a"}], 400, None, "JSON object"),
        ({"requests": [{"prompt": "a"}, 1]}, 400, "requests[1]", "requests[1]: The body must be a JSON object"),
        ({"requests": [{"prompt": "a"}, {}]}, 400, "requests[1].prompt", "requests[1]: prompt: is required"),
        ({"requests": [{"prompt": "a", "size": "1x1"}]}, 400, "requests[0].size", "requests[0]: size: tiny-text has"),
        ({"requests": [{"promt": "a"}]}, 400, "requests[0].promt", "did you mean"),
        ({"requests": [{"prompt": "a"}, {"model": "no"}]}, 404, "requests[1].model", 'There is no model "no"'),
        ({"requests": [{"prompt": "a", "image": "x"}]}, 400, "requests[0].image", "Unknown field"),
        ({"requests": [{"prompt": "x" * 2**20}]}, 413, None, "bytes"),
        ({"requests": [{"class_label": [0] * 5000}]}, 413, None, "4096 values"),
    ],
)
def test_a_bad_body_is_the_answer_to_the_whole(
    http: httpx.Client, server: Server, body: Any, status: int, param: str | None, words: str
) -> None:
    reply = http.post("/v1/images/batch", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param) and words in error["message"]
    assert idle(server)


def test_the_document_has_the_bodies_by_reference(http: httpx.Client) -> None:
    route = http.get("/openapi.json").json()["paths"]["/v1/images/batch"]["post"]
    asked = route["requestBody"]["content"]["application/json"]
    assert {*route["responses"]["200"]["content"]} == {"text/event-stream"}
    assert batch(http, *asked["example"]["requests"]).status_code == 200
    schema = asked["schema"]["properties"]["requests"]
    names = [one["$ref"].rpartition("/")[2] for one in schema["items"]["anyOf"]]
    assert sorted(names) == ["ImageBody.tiny-label", "ImageBody.tiny-text"]
    assert (schema["minItems"], schema["maxItems"]) == (1, 16)
    assert checker_of(http, "ImageBody.tiny-text").is_valid({"prompt": "a", "progress": True, "stream": True})


def test_an_error_of_one_request_leaves_the_others(http: httpx.Client) -> None:
    before = outcomes(http, "tiny-text")
    reply = batch(http, {"prompt": "a", "seed": 1}, {"prompt": "!nan batch"}, {"prompt": "!slow 0.3", "seed": 3})
    found = of_each(events(reply.text), 3)
    assert (reply.status_code, [kinds(one) for one in found]) == (
        200,
        [["completed"], ["non_finite_output"], ["completed"]],
    )
    assert found[1][0].keys() == {"error", "request_index"}
    assert found[1][0]["error"].keys() == {"message", "type", "param", "code"}
    assert grown(http, "tiny-text", before) == {"answered": 2.0, "failed": 1.0}


def test_what_makes_no_sense_in_a_stream_is_a_warning(http: httpx.Client) -> None:
    reply = batch(http, {"prompt": "a"}, {"prompt": "b", "n": 2}, headers={"Accept": "image/png"})
    done = events(reply.text)
    assert len(done) == 3
    assert {tuple(event["warnings"]) for event in done} == {("Accept is ignored: stream answers with events",)}


def test_a_line_of_the_log_counts_all(http: httpx.Client, log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    batch(http, {"prompt": "secret", "n": 2}, {"model": "tiny-label", "class_label": 1}, {"prompt": "secret"})
    (line,) = [line for line in lines(log, 1) if line["path"] == "/v1/images/batch"]
    assert (line["status"], line["models"], line["requests"], line["images"]) == (
        200,
        ["tiny-text", "tiny-label"],
        3,
        4,
    )
    assert line["denoise_ms"] > 0 and not {"model", "seed", "steps"} & line.keys() and "secret" not in str(line)


def test_a_client_that_leaves_cancels_all(http: httpx.Client, server: Server) -> None:
    before = outcomes(http, "tiny-text")
    body = {"requests": [{**SLOW, "prompt": "a"}, SLOW, SLOW, SLOW]}
    with http.stream("POST", "/v1/images/batch", json=body) as reply:
        events = read(reply.iter_lines())  # to forget it is to leave
        assert any(event["type"].endswith("completed") for event in events)
        assert server.supervisor.running + server.supervisor.waiting == 3
    eventually(lambda: idle(server))
    assert grown(http, "tiny-text", before) == {"answered": 1.0, "cancelled": 3.0}


def test_a_picture_goes_when_it_is_sent_not_with_the_last_one(http: httpx.Client, server: Server) -> None:
    gc.collect()
    gc.disable()
    try:
        before = alive()
        with http.stream("POST", "/v1/images/batch", json={"requests": [{"prompt": "a", "n": 4}, SLOW]}) as reply:
            done = (event for event in read(reply.iter_lines()) if event["type"].endswith("completed"))
            assert [next(done)["image_index"] for _ in range(4)] == [0, 1, 2, 3]
            eventually(lambda: alive() == (before[0], before[1] + 1))
        eventually(lambda: idle(server) and alive() == before)
    finally:
        gc.enable()


def alive() -> tuple[int, int]:
    """Results and jobs that are still there."""
    found = [type(one) for one in gc.get_objects()]
    return found.count(Result), found.count(Job)


def test_one_that_is_refused_takes_the_others_with_it(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, calls = server.supervisor.submit, []

    def submit(job: Job, **more: Any) -> Job:
        calls.append(job)
        server.supervisor.closing = len(calls) == 3
        try:
            return inner(job, **more)
        finally:
            server.supervisor.closing = False

    monkeypatch.setattr(server.supervisor, "submit", submit)
    before = outcomes(http, "tiny-text")
    reply = batch(http, SLOW, SLOW, SLOW, SLOW)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (503, "shutting_down", "requests[2]")
    assert "retry-after" in reply.headers and len(calls) == 3
    eventually(lambda: idle(server))
    assert grown(http, "tiny-text", before) == {"cancelled": 2.0, "refused": 1.0}


def test_more_work_than_may_wait_is_no_matter_of_time(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs are planted: no later moment takes all of them."""
    limit = server.app.state.front.settings.max_wait
    monkeypatch.setattr("app.worker.admission.Backlog.image", lambda backlog, kind: 0.3 * limit)
    reply = batch(http, *[SLOW] * 8)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "requests")
    assert re.search(rf"the first \d of 8 requests are \d+ seconds of work already, and {limit:.0f} may", reply.text)
    eventually(lambda: idle(server))


def test_pixels_of_a_batch_are_bounded(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.compare.PIXELS", 3 * 32 * 32)
    assert batch(http, {"prompt": "a", "n": 2}, {"prompt": "a"}).status_code == 200
    error = batch(http, {"prompt": "a", "n": 2}, {"prompt": "a", "n": 2}).json()["error"]
    assert error["param"] == "requests" and "4 pictures have" in error["message"]


def test_a_key_sees_its_own_models_alone(closed: Server) -> None:
    with httpx.Client(base_url=closed.url, headers=bearer(BOB)) as bob:
        reply = batch(bob, {"model": "tiny-label", "class_label": 1}, {"model": "tiny-text", "prompt": "a"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "requests[1].model")
    assert httpx.post(f"{closed.url}/v1/images/batch", json={"requests": []}).status_code == 401


def test_a_ping_fills_silence_and_a_timeout_of_the_client_is_no_deadline(
    url: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.images.PING", 0.05)
    text = batch(http, {"prompt": "!slow 0.5"}, headers={"X-Stainless-Read-Timeout": "0.1"}).text
    assert text.startswith(": ping\n\n") and kinds(events(text)) == ["completed"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    posted = client.post("/images/batch", cast_to=httpx.Response, body={"requests": [{"prompt": "a"}]})
    assert kinds(events(posted.text)) == ["completed"]
