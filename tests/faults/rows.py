"""Requests that harm the engine: those that end its process, and those that fail in a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tests.faults.harness import Ask, Load, Stage, fault, mixed, send
from tests.parts.edits import as_field, picture

FIRST = 10
"""Place of the first bad request."""


def wicked(words: str, **changes: object) -> Ask:
    """A request that does what these words say, as `tests/parts/gated_worker.py` lists them; some need a picture."""
    start = {"image": as_field(picture(32, 32)), "strength": 0.7} if words.startswith("!source") else {}
    return Ask({"model": "tiny-sd3", "prompt": words, "seed": 5, "num_inference_steps": 6, **start, **changes})


def among(stage: Stage, bad: Sequence[str]) -> tuple[Load, range]:
    """32 requests with these bad ones among them, all there before the first is drawn; and the places of the bad."""
    asks = mixed()[: 32 - len(bad)]
    asks[FIRST:FIRST] = map(wicked, bad)
    stage.arm("encode")
    load = Load(stage, asks)
    stage.landed()
    if len(stage.pids) == 1:  # else another goes on
        load.settle()
    stage.release()
    return load, range(FIRST, FIRST + len(bad))


def poisoned(stage: Stage, poisons: Sequence[str]) -> None:
    """Each poison is a 500 after its second death; the others are answered; its twin is refused at once."""
    load, places = among(stage, poisons)
    replies = load.replies()
    load.check(replies, failed=places)
    for place in places:
        assert (replies[place].status, replies[place].code) == (500, "crashed"), replies[place]
        assert replies[place].headers["x-should-retry"] == "false"
    stage.recovered()
    deaths = stage.restarts()
    assert 1 + len(poisons) <= deaths <= 2 * len(poisons), deaths
    for words in poisons:
        twin = send(stage.url, wicked(words, seed=6))
        assert (twin.status, twin.code, twin.headers["x-should-retry"]) == (500, "crashed", "false")
    good = send(stage.url, load.asks[0])
    assert good.status == 200 and stage.restarts() == deaths


for phase, deed in (
    ("source", "kill"),
    ("encode", "kill"),
    ("denoise", "kill"),
    ("denoise", "exit"),
    ("decode", "kill"),
):
    fault(f"a poison in {phase} ({deed}) among 31")(partial(poisoned, poisons=(f"!{phase} {deed}",)))
fault("two poisons in denoise among 30")(partial(poisoned, poisons=("!denoise kill", "!denoise exit")))
fault("a poison in denoise among 31, two devices", engines=2)(partial(poisoned, poisons=("!denoise kill",)))

FAILURES = {
    "!denoise nan": (500, "non_finite_output"),
    "!denoise error": (500, "internal_error"),
    "!denoise oom": (507, "insufficient_gpu_memory"),
    "!encode error": (500, "internal_error"),
    "!source error": (500, "internal_error"),
    "!source oom": (507, "insufficient_gpu_memory"),
    "!decode oom": (507, "insufficient_gpu_memory"),
}


@fault("NaN, error and out of memory in a step, among 25")
def failures(stage: Stage) -> None:
    """Each fails alone, and no process dies."""
    pids = stage.pids
    load, places = among(stage, list(FAILURES))
    replies = load.replies()
    load.check(replies, failed=places)
    assert [(replies[place].status, replies[place].code) for place in places] == list(FAILURES.values())
    assert stage.pids == pids and stage.restarts() == 0 and stage.total("requests_replayed_total") == 0
