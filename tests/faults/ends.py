"""What ends while requests are in flight: the server, a client's patience, a deadline."""

from __future__ import annotations

import signal

import httpx

from tests.faults.harness import Ask, Load, Stage, fault, mixed, send
from tests.parts.waiting import eventually

DRAIN = 5


def leaves(url: str, ask: Ask) -> bool:
    """Whether a client that has a second of patience leaves without an answer."""
    try:
        send(url, ask, timeout=1.0)
    except httpx.ReadTimeout:
        return True
    return False


@fault("SIGTERM under 32 requests")
def drained(stage: Stage) -> None:
    stage.arm("denoise", 12)
    load = Load(stage, mixed())
    stage.landed()
    assert load.settle()
    stage.served.process.send_signal(signal.SIGTERM)
    stage.release()
    load.check(load.replies())
    assert stage.end() < stage.settings.drain


@fault("kill -9, then SIGTERM before the next engine lives", drain=100)
def drained_by_the_next(stage: Stage) -> None:
    """It comes within the grace, and answers what waits."""
    stage.arm("denoise", 12)
    load = Load(stage, mixed())
    pid = stage.landed()
    left = load.settle()
    stage.kill(pid)
    assert stage.end() < stage.settings.drain
    load.check(load.replies(), restarted=left)


@fault("SIGTERM while 32 requests wait for a dead engine", drain=DRAIN)
def stopped_without_engine(stage: Stage) -> None:
    stage.arm("denoise", 12)
    load = Load(stage, mixed())
    pid = stage.landed()
    left = load.settle()
    stage.break_starts()
    stage.kill(pid)
    eventually(lambda: stage.restarts() >= 2)  # the first has failed by now
    late = send(stage.url, mixed()[0])
    assert (late.status, late.code) == (503, "no_worker") and int(late.headers["retry-after"]) >= 1
    assert load.open == left
    seconds = stage.end()
    replies = load.replies()
    load.check(replies, failed=left)
    for number in left:
        reply = replies[number]
        begun = load.asks[number].form == "stream" and reply.status == 200
        assert begun or (reply.status == 503 and int(reply.headers["retry-after"]) >= 1), reply
        assert reply.code in ("shutting_down", "no_worker"), reply
    assert seconds < DRAIN + 10


@fault("a client that leaves and a deadline that passes, while the engine is dead")
def given_up(stage: Stage) -> None:
    """Neither is drawn when the engine is back; the third is."""
    body = {"model": "tiny-sd3", "prompt": "cat", "seed": 1, "num_inference_steps": 6}
    stage.arm("encode")
    load = Load(stage, [Ask(body), Ask(body | {"deadline": 4.0}), Ask(body | {"deadline": 4.0}, "stream")])
    pid = stage.landed()
    load.settle()
    stage.break_starts()
    stage.kill(pid)
    assert leaves(stage.url, Ask(body | {"seed": 2}))
    eventually(lambda: load.open == [0] and stage.unanswered == 1, why=lambda: f"{load.open} {stage.unanswered}")
    assert not stage.ready and stage.total("num_requests_waiting_by_reason", reason="engine") == 1
    stage.break_starts(False)
    replies = load.replies()
    load.check(replies, failed=[1, 2])
    assert [reply.code for reply in replies[1:]] == ["deadline_exceeded"] * 2 and replies[1].status == 504
    assert stage.total("images_total") == 1
