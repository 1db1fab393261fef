"""One image, stage by stage, through the engine; and whole, beside other ways to draw it in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from app.bench.machine import Spread, alternate, seconds, spread
from app.bench.subject import Subject
from app.engine.engine import Engine
from app.families.base import Family
from app.imaging import encode_image
from app.jobs.body import read_body
from app.report import Failure, Report, Result
from app.request import Request

PROMPT = "a red apple"
Draw = Callable[[], np.ndarray]


class Drawn(NamedTuple):
    """times: of one image by the way it was drawn: "instep" encodes its prompt anew, "instep-cached" has it, and both
    keep the empty one, as a server that has run. pictures: the last of each. stages: seconds of Instep's, by name."""

    times: dict[str, Spread]
    pictures: dict[str, np.ndarray]
    stages: dict[str, Spread]


def asked(subject: Subject, *, steps: int | None = None, guidance: float | None = None, size: str | None) -> Request:
    """The measured request: the card's defaults where nothing is given. Raises InvalidValue as a server does."""
    what = {"class_label": 0} if subject.card.draws_classes else {"prompt": PROMPT}
    body = {**what, "num_inference_steps": steps, "guidance_scale": guidance, "size": size, "seed": 0}
    return read_body(body).to_request(subject.card, "bench")


def measure_image(subject: Subject, request: Request, rounds: int, others: Mapping[str, Draw] | None = None) -> Drawn:
    """Draw the request by every way in turns. others: ways of other systems, which leave the device as they find it."""
    settings = subject.settings.model_copy(update={"text_cache": "0"})
    forgetting: list[Report] = []
    engines = {
        "instep": (Engine(subject.pool, settings, forgetting.append), forgetting),
        "instep-cached": (subject.engine, subject.reports),
    }
    results: dict[str, list[Result]] = {name: [] for name in engines}
    draws: dict[str, Draw] = {
        name: partial(_serve, engine, reports, request, results[name]) for name, (engine, reports) in engines.items()
    }
    pictures: dict[str, np.ndarray] = {}

    def draw(name: str) -> None:
        pictures[name] = draws[name]()

    draws |= others or {}
    times = alternate({name: partial(seconds, partial(draw, name), subject.family.device) for name in draws}, rounds)
    own = {name: found[-rounds:] for name, found in results.items()}
    stages = _stages(own) | _inside(subject, request, rounds) | _encoding(pictures["instep"], rounds)
    return Drawn(times, pictures, stages)


def _serve(engine: Engine, reports: list[Report], request: Request, results: list[Result]) -> np.ndarray:
    """Tick the engine until the request is answered."""
    reports.clear()
    engine.submit(replace(request, id=f"{request.id}-{len(results)}"))
    while True:
        if not engine.tick():
            time.sleep(0.0005)
        for report in reports:
            if isinstance(report, Failure):
                raise report.error
            if isinstance(report, Result):
                results.append(report)
                return report.pixels


def _stages(results: dict[str, list[Result]]) -> dict[str, Spread]:
    """From the engine's own timings. NOTE: the engine waits for a step's device time at the next work, so that on a GPU
    the last step of an image counts as its decode."""
    fresh, cached = ([one.timings for one in results[name]] for name in ("instep", "instep-cached"))
    return {
        "encode text, fresh": spread([one.encode for one in fresh]),
        "encode text, cached": spread([one.encode for one in cached]),
        "denoise": spread([one.denoise for one in fresh + cached]),
        "denoise, a step": spread([one.denoise / one.steps for one in fresh + cached]),
        "decode": spread([one.decode for one in fresh + cached]),
    }


def _inside(subject: Subject, request: Request, rounds: int) -> dict[str, Spread]:
    """Of a step, the network's seconds and those left to the host, in rounds of their own with a clock inside."""
    network, host = [], []
    for _ in range(rounds):
        results: list[Result] = []
        with _clocked(subject.family) as times:
            _serve(subject.engine, subject.reports, request, results)
        steps = results[0].timings.steps
        network.append(sum(times) / steps)
        host.append(results[0].timings.denoise / steps - network[-1])
    return {"a step: network": spread(network), "a step: outside the network": spread(host)}


@contextmanager
def _clocked(family: Family) -> Iterator[list[float]]:
    """Append the seconds of each of the family's forwards to the list meanwhile, the device waited for."""
    times: list[float] = []
    plain, own = family.denoise, vars(family)

    def clocked(*arguments: Any) -> Any:
        out: list[Any] = []
        times.append(seconds(lambda: out.append(plain(*arguments)), family.device))
        return out[0]

    own["denoise"] = clocked
    try:
        yield times
    finally:
        del own["denoise"]


def _encoding(picture: np.ndarray, rounds: int) -> dict[str, Spread]:
    cpu = torch.device("cpu")
    return {"encode PNG": spread([seconds(lambda: encode_image(picture, "png", None, {}), cpu) for _ in range(rounds)])}
