"""Image: one request, stage by stage, through the engine; and whole, against diffusers' pipelines in the same run.

Knows nothing of how requests meet (the serving bench) or of how the numbers are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from app.bench.machine import wait
from app.bench.subject import Subject
from app.bench.timing import Spread, alternate, spread
from app.engine.engine import Engine
from app.errors import InvalidValue
from app.families.base import Family
from app.families.compiling import allow_compiling
from app.families.upstream import Upstream
from app.imaging import encode_image
from app.jobs.body import read_body
from app.report import Failure, Report, Result
from app.request import Request

PROMPT = "a red apple"
REFERENCE = "eager-float32"
BASELINES: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": torch.float32},
    "eager-bfloat16": {"dtype": torch.bfloat16},
    "compiled": {"compiled": True},
    "compiled-float32": {"dtype": torch.float32, "compiled": True},
    "compiled-bfloat16": {"dtype": torch.bfloat16, "compiled": True},
}
"""diffusers' pipelines by name; "compiled" is in the number format that Instep runs in."""


class Distance(NamedTuple):
    """Between two pictures, in levels of 0..255: the mean and the largest absolute difference."""

    mean: float
    largest: int


@dataclass
class Way:
    """One way to draw the request. seconds: of one call. picture: what the last call drew."""

    draw: Callable[[], np.ndarray]
    device: torch.device
    picture: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))

    def __call__(self) -> float:
        wait(self.device)
        start = time.perf_counter()
        self.picture = self.draw()
        wait(self.device)
        return time.perf_counter() - start


class Drawn(NamedTuple):
    """times: of one image, by the way it was drawn; "instep" encodes its prompt anew, "instep-cached" has it, and both
    keep the empty one, as a server that has run; diffusers encodes both each time.
    distances: to the picture of REFERENCE; empty when that was not asked for. stages: seconds of Instep's, by name."""

    times: dict[str, Spread]
    distances: dict[str, Distance]
    stages: dict[str, Spread]


def asked(subject: Subject, *, steps: int | None = None, guidance: float | None = None, size: str | None) -> Request:
    """The request that is measured: the card's defaults but for what is said. Raises InvalidValue as a server does."""
    what = {"class_label": 0} if subject.card.draws_classes else {"prompt": PROMPT}
    body = {**what, "num_inference_steps": steps, "guidance_scale": guidance, "size": size, "seed": 0}
    return read_body(body).to_request(subject.card, "bench")


def measure_image(subject: Subject, request: Request, baselines: Sequence[str], rounds: int) -> Drawn:
    """Draw the request by every way in turns. Raises InvalidValue: no such baseline, or none for this request."""
    settings = subject.settings.model_copy(update={"text_cache": "0"})
    forgetting: list[Report] = []
    engines = {
        "instep": (Engine(subject.pool, settings, forgetting.append), forgetting),
        "instep-cached": (subject.engine, subject.reports),
    }
    results: dict[str, list[Result]] = {name: [] for name in engines}
    ways: dict[str, Way] = {}
    for name, (engine, reports) in engines.items():
        ways[name] = Way(partial(_served, engine, reports, request, results[name]), subject.family.device)
    for name in baselines:
        ways[name] = Way(partial(_upstream(subject, name).draw, request), subject.family.device)
    times = alternate(ways, rounds)
    own = {name: found[-rounds:] for name, found in results.items()}
    reference = ways[REFERENCE].picture if REFERENCE in ways else None
    distances = {name: distance(way.picture, reference) for name, way in ways.items() if reference is not None}
    return Drawn(times, distances, _stages(own) | _inside(subject, request, rounds) | _encoding(ways, rounds))


def distance(picture: np.ndarray, reference: np.ndarray) -> Distance:
    """Of two uint8 pictures of one size."""
    away = np.abs(picture.astype(np.int16) - reference)
    return Distance(float(away.mean()), int(away.max()))


def _upstream(subject: Subject, name: str) -> Upstream:
    if name not in BASELINES:
        raise InvalidValue(f'baselines: there is no "{name}"; there are {", ".join(BASELINES)}', param="baselines")
    if BASELINES[name].get("compiled"):
        allow_compiling(subject.settings.cache)
    return Upstream(subject.family, **BASELINES[name])


def _served(engine: Engine, reports: list[Report], request: Request, results: list[Result]) -> np.ndarray:
    """The request through the engine, turned here until it is answered."""
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
    """Of a step, what the network takes and what is left to the host, in rounds of their own with a clock inside."""
    network, host = [], []
    for _ in range(rounds):
        results: list[Result] = []
        with _clocked(subject.family) as seconds:
            _served(subject.engine, subject.reports, request, results)
        steps = results[0].timings.steps
        network.append(sum(seconds) / steps)
        host.append(results[0].timings.denoise / steps - network[-1])
    return {"a step: network": spread(network), "a step: outside the network": spread(host)}


@contextmanager
def _clocked(family: Family) -> Iterator[list[float]]:
    """Within it, the seconds of each of the family's forwards are appended to the list, the device waited for."""
    seconds: list[float] = []
    plain, own = family.denoise, vars(family)

    def clocked(*given: Any) -> Any:
        wait(family.device)
        start = time.perf_counter()
        out = plain(*given)
        wait(family.device)
        seconds.append(time.perf_counter() - start)
        return out

    own["denoise"] = clocked
    try:
        yield seconds
    finally:
        del own["denoise"]


def _encoding(ways: dict[str, Way], rounds: int) -> dict[str, Spread]:
    picture = ways["instep"].picture
    png = Way(lambda: np.frombuffer(encode_image(picture, "png", None, {}), np.uint8), torch.device("cpu"))
    return {"encode PNG": spread([png() for _ in range(rounds)])}
