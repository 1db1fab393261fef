"""Engine processes that are killed or stopped, wherever they are, while 32 mixed requests wait for them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial

from tests.faults.harness import Ask, Load, Stage, adapted, edits, fault, mixed
from tests.parts.waiting import eventually


def killed(
    stage: Stage, phase: str, count: int, number: int = signal.SIGKILL, asks: Callable[[], list[Ask]] = mixed
) -> None:
    """One death in this phase, with some answered and all others accepted."""
    stage.arm(phase, count)
    load = Load(stage, asks())
    pid = stage.landed()
    left = load.settle()
    assert len(left) > len(load.asks) // 2
    stage.kill(pid, number)
    assert not stage.ready
    # A process is known to be gone some ms before its requests wait for the next one.
    eventually(lambda: stage.total("num_requests_waiting_by_reason", reason="engine") == len(left))
    load.check(load.replies(), restarted=left)
    assert stage.total("requests_replayed_total") == len(left) and stage.restarts() == 1
    assert stage.served.words.count('"restarts": 1') == len(left), "the access log"
    assert stage.total("images_total") == len(load.asks) and stage.unanswered == 0
    assert stage.total("num_requests_waiting_by_reason") == 0
    stage.recovered()


for phase, count in (("encode", 2), ("denoise", 12), ("decode", 2)):
    fault(f"kill -9 in {phase}")(partial(killed, phase=phase, count=count))
fault("kill -9 in load", preload="")(partial(killed, phase="load", count=0))
fault("kill -9 in denoise, not deterministic", deterministic=False)(partial(killed, phase="denoise", count=12))
fault("SIGSTOP in denoise")(partial(killed, phase="denoise", count=12, number=signal.SIGSTOP))


def from_pictures() -> list[Ask]:
    """Two of three start from a picture, most of these with a mask: their pictures are kept with the requests."""
    return edits(12) + mixed(6)


for phase, count in (("source", 2), ("denoise", 12), ("decode", 2)):
    fault(f"kill -9 in {phase}, with edits")(partial(killed, phase=phase, count=count, asks=from_pictures))


for phase, count in (("encode", 2), ("denoise", 12)):
    fault(f"kill -9 in {phase}, with adapters", loras=True)(
        partial(killed, phase=phase, count=count, asks=partial(adapted, 24))
    )


@fault("kill -9 in the load of an adapter", loras=True)
def loading(stage: Stage) -> None:
    """Only its loader waits: rows that need no other adapter are answered until then."""
    stage.arm("adapter", 1)
    load = Load(stage, adapted(24))
    pid = stage.landed()
    eventually(lambda: len(load.open) < len(load.asks), 60, lambda: "nobody is answered while an adapter is loaded")
    stage.kill(pid)
    load.check(load.replies())
    assert stage.restarts() == 1 and stage.total("requests_replayed_total") > 0
    assert stage.total("images_total") == len(load.asks)
    stage.recovered()


@fault("kill -9 while idle, 32 requests at once after it")
def idle(stage: Stage) -> None:
    stage.kill(stage.pids[0])
    load = Load(stage, mixed())
    assert len(load.settle()) == len(load.asks)
    assert stage.total("num_requests_waiting_by_reason", reason="engine") == len(load.asks)
    load.check(load.replies())


@fault("kill -9 five times, 2 s apart")
def five_times(stage: Stage) -> None:
    stage.arm("denoise", 12)
    load = Load(stage, mixed())
    pid = stage.landed()
    left = load.settle()
    stage.kill(pid)
    for _ in range(4):
        time.sleep(2)
        eventually(lambda: stage.pids, why=lambda: "no engine process was started")
        os.kill(stage.pids[0], signal.SIGKILL)
    load.check(load.replies(), restarted=left)
    assert stage.restarts() == 5 and stage.total("images_total") == len(load.asks)


@fault("kill -9 of a lone request, four times, each later in it")
def lone(stage: Stage) -> None:
    """It got past each line at which it was suspect, so it is not to blame for the next death."""
    body = {"model": "tiny-sd3", "prompt": "two dogs", "seed": 7, "num_inference_steps": 12}
    stage.arm("denoise", 1)
    load = Load(stage, [Ask(body)])
    for forwards in (3, 7, 11, None):
        pid = stage.landed()
        if forwards:
            stage.arm("denoise", forwards)
        stage.kill(pid)
    load.check(load.replies())
    assert stage.restarts() == 4


@fault("kill -9 of one of two devices, which does not come back", engines=2)
def one_of_two(stage: Stage) -> None:
    stage.arm("denoise", 4)
    load = Load(stage, mixed())
    pid = stage.landed()
    stage.break_starts()
    before = len(load.open)
    stage.kill(pid)
    assert before and stage.ready and stage.total("workers_live") == 1
    load.check(load.replies())
    assert stage.total("requests_replayed_total") > 0 and stage.total("workers_live") == 1
    assert stage.total("images_total") == len(load.asks)


@fault("kill -9 when two of four images are answered")
def half_answered(stage: Stage) -> None:
    """The two are not drawn again: what is denoised after the death are the lines of the other two."""
    for form in ("json", "stream"):
        steps, served = 6, stage.total("images_total")
        body = {"model": "tiny-sd3", "prompt": "two dogs", "n": 4, "seed": 7, "num_inference_steps": steps}
        stage.arm("decode", 1)
        load = Load(stage, [Ask(body, form)])
        pid = stage.landed()
        eventually(lambda: stage.unanswered == 2, why=lambda: f"{stage.unanswered} unanswered, not 2")
        stage.kill(pid)
        drawn = stage.total("batch_rows_sum")
        replies = load.replies()
        load.check(replies, restarted=[0])
        assert stage.total("batch_rows_sum") - drawn == 2 * steps
        assert stage.total("images_total") - served == 4


@fault("kill -9 under 12 requests, and 12 more while no engine lives")
def in_order(stage: Stage) -> None:
    """Those that waited are not overtaken."""
    body = {"model": "tiny-sd3", "prompt": "cat", "num_inference_steps": 6}
    stage.arm("denoise", 2)
    first = Load(stage, [Ask(body | {"seed": seed}) for seed in range(12)])
    pid = stage.landed()
    left = first.settle()
    assert len(left) == 12
    stage.kill(pid)
    later = Load(stage, [Ask(body | {"seed": seed}) for seed in range(12, 24)])
    eventually(lambda: stage.unanswered == 24, why=lambda: f"{stage.unanswered} unanswered, not 24")
    early, late = first.replies(), later.replies()
    first.check(early)
    later.check(late)
    ahead = sum(reply.at < sorted(one.at for one in early)[7] for reply in late)
    assert ahead == 0, f"{ahead} of those that came later were answered before two thirds of the first"
