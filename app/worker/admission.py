"""Admission: which worker takes a request, and whether it may queue there, by estimated seconds of device time."""

from __future__ import annotations

import math
import random
import time
from bisect import bisect, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from app.cards.card import parse_size
from app.errors import DeadlineExceeded, RateLimited, Unavailable
from app.jobs.job import Estimate, Job
from app.report import Failure, Memory, ModelState, Preview, Progress, Report, Result, State, Tick
from app.request import Delivery, Key

BUSY = 0.5
"""The part of MAX_WAIT up to which a queue is open to all, whoever fills it."""

DEFAULT_RATE = 0.05
"""Seconds a pass until a model has been measured: about SD3.5-large at 1024 px on one large GPU."""

PACE = 0.1
"""How far an average moves towards what was just measured."""

OUTLIER = 4.0
"""A measurement over so many times the average counts as that: the first decode after a load also loads."""

_USEFUL: tuple[State, ...] = ("ready", "loading", "failed", "absent")


class Kind(NamedTuple):
    """What images of equal cost have in common. passes: through the network, of one image. sourced: with a source.
    later: the keys of the models that draw after the first, with their passes."""

    tenant: str
    key: Key
    passes: int
    sourced: bool = False
    later: tuple[tuple[Key, int], ...] = ()

    @property
    def legs(self) -> tuple[tuple[Key, int], ...]:
        """The keys of all models that draw an image, with their passes."""
        return ((self.key, self.passes), *self.later)


def kind_of(job: Job) -> Kind:
    """The kind of a job's images. Raises InvalidValue for a sampler or steps that the schedule does not have."""
    recipe = job.request.recipe
    # The engine compiles the same tables, for the image's own number of tokens. No cost depends on the text length.
    legs = [
        (recipe.key._replace(model=model), recipe.passes(table.lines, table.first))
        for model, table in job.card.legs(recipe).items()
    ]
    return Kind(job.request.delivery.tenant, *legs[0], recipe.strength is not None, tuple(legs[1:]))


class Rates:
    """Estimated device seconds of an image, from what the engine has learned of a pass and from past work.

    The other phases count as one pass each until they have been seen. Sizes of the same area have the same number
    of tokens, and one rate.
    """

    def __init__(self) -> None:
        self._rates: dict[str, dict[int, float]] = {}
        self._areas: dict[str, list[int]] = {}  # of the rates, in order
        self._seen: dict[tuple[str, str, int, int], float] = {}

    def hear(self, report: ModelState | Tick) -> None:
        """Learn from a report of the engine."""
        if isinstance(report, ModelState):
            for size, rate in report.rates.items():
                self._set(report.model, math.prod(parse_size(size)), rate)
        elif report.phase == "denoise" and report.rate:
            self._set(report.model, report.width * report.height, report.rate)
        elif report.phase != "denoise" and report.width:
            place = (report.model, report.phase, report.width, report.height)
            known = self._seen.get(place, self.rate(report.model, report.width, report.height))
            self._seen[place] = known + PACE * (min(report.seconds / report.rows, OUTLIER * known) - known)

    def _set(self, model: str, area: int, rate: float) -> None:
        rates = self._rates.setdefault(model, {})
        if area not in rates:
            insort(self._areas.setdefault(model, []), area)
        rates[area] = rate

    def measured(self, model: str) -> bool:
        """Whether the estimates for this model are more than a guess."""
        return bool(self._rates.get(model))

    def image(self, kind: Kind) -> float:
        """Seconds of one image: its passes and an encode in each model, the source in the first, the decode in the
        last."""
        seconds, legs = 0.0, kind.legs
        for leg in legs:
            (key, passes), rate = leg, self.rate(leg[0].model, leg[0].width, leg[0].height)
            phases = ["encode", *["source"] * (kind.sourced and leg is legs[0]), *["decode"] * (leg is legs[-1])]
            around = (self._seen.get((key.model, phase, key.width, key.height), rate) for phase in phases)
            seconds += passes * rate + sum(around)
        return seconds

    def rate(self, model: str, width: int, height: int) -> float:
        """Seconds a pass at width x height pixels: measured, or scaled by area from the nearest size, or a guess."""
        rates = self._rates.get(model)
        if not rates:
            return DEFAULT_RATE
        area, areas = width * height, self._areas[model]
        above = bisect(areas, area)
        nearest = min(areas[max(0, above - 1) : above + 1], key=lambda known: abs(known - area))
        return rates[nearest] * area / nearest


class Backlog:
    """The jobs of one worker, what their unanswered images take, and what the engine last reported of its models.

    Images are counted by kind: a sum over kinds is exact and cheap, however many jobs there are. An image counts whole
    until it is answered, which overstates the queue by at most what is in the slots. Rates outlive the process: the
    next one has the same device and the same files.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.weights: dict[str, float] = {}  # of the tenants that have images here
        self.rates = Rates()
        self._images: Counter[Kind] = Counter()
        self._states: dict[str, ModelState] = {}
        self._were_ready: set[str] = set()
        self._memory: dict[str, int] = {}
        self._running = 0
        self._rows: dict[str, int] = {}

    def add(self, job: Job) -> None:
        """A job more; its weight is from now on that of its tenant."""
        self.jobs[job.request.id] = job
        self._images[kind_of(job)] += job.images_left
        self.weights[job.request.delivery.tenant] = job.request.delivery.weight

    def end(self, request_id: str) -> None:
        """A job is answered, failed or cancelled."""
        job = self.jobs.pop(request_id)
        if job.images_left:
            self._drop(kind_of(job), job.images_left)

    def _drop(self, kind: Kind, images: int) -> None:
        """So many images fewer. What the last Ticks counted ends with the last image."""
        self._images[kind] -= images
        if not self._images[kind]:
            del self._images[kind]
            if not any(other.tenant == kind.tenant for other in self._images):
                del self.weights[kind.tenant]
            drawing = {key.model for other in self._images for key, _ in other.legs}
            self._rows = {model: rows for model, rows in self._rows.items() if model in drawing}
        if not self._images:
            self._running = 0

    def hear(self, report: Report) -> None:
        """Learn from a report of the engine, and hand it to the job in flight that it is about."""
        if isinstance(report, ModelState | Tick):
            self.rates.hear(report)
        match report:
            case Result() | Progress() | Preview() | Failure():
                if job := self.jobs.get(report.request_id):
                    if isinstance(report, Result) and report.index not in job.results:
                        self._drop(kind_of(job), 1)
                    job.hear(report)
            case ModelState():
                self._states[report.model] = merge(self.state(report.model), report)
                if report.state == "ready":
                    self._were_ready.add(report.model)
            case Memory():
                self._memory = report.bytes
            case Tick():
                self._running = report.running
                if report.phase == "denoise" and report.rows:
                    self._rows[report.model] = report.rows

    def forget(self) -> list[Memory | ModelState]:
        """The process is dead, and what it had loaded is gone. Returns the reports of that."""
        absent = [ModelState(model, "absent") for model in self._states]
        self._states, self._running, self._rows = {}, 0, {}
        self._were_ready.clear()
        return [Memory(dict.fromkeys(self._memory, 0)), *absent]

    def state(self, model: str) -> ModelState:
        """How the model stands here."""
        return self._states.get(model) or ModelState(model, "absent")

    def worst(self, models: Iterable[str]) -> ModelState:
        """The state of the least useful of these models here; one that failed is the least useful of all."""
        return max(map(self.state, models), key=lambda known: (known.state == "failed", _USEFUL.index(known.state)))

    def proved(self, model: str) -> bool:
        """Whether this process has had the model ready, and has not failed to load it since."""
        return model in self._were_ready and self.state(model).state != "failed"

    @property
    def images(self) -> int:
        return self._images.total()

    def images_of(self, model: str) -> tuple[int, int]:
        """Unanswered images that a model draws first: those that were in its last denoising forward, and all."""
        images = sum(images for kind, images in self._images.items() if kind.key.model == model)
        return min(images, self._rows.get(model, 0)), images

    @property
    def running(self) -> int:
        """Images in a batch or encoded for the next, as of the last Tick."""
        return min(self.images, self._running)

    @property
    def seconds(self) -> float:
        """Device seconds of everything."""
        return sum(self.tenants().values())

    def tenants(self) -> dict[str, float]:
        """Device seconds by tenant."""
        seconds: dict[str, float] = dict.fromkeys(self.weights, 0.0)
        for kind, images in self._images.items():
            seconds[kind.tenant] += images * self.image(kind)
        return seconds

    def image(self, kind: Kind) -> float:
        """Device seconds of one image of this kind."""
        return self.rates.image(kind)

    def before(self, kind: Kind) -> float:
        """Device seconds of the tenant's own images that take no longer than one of this kind, and so go first."""
        own = self.image(kind)
        same = ((other, images) for other, images in self._images.items() if other.tenant == kind.tenant)
        return sum(images * each for other, images in same if (each := self.image(other)) <= own)

    def wait(self, tenant: str, weight: float, own: float) -> float:
        """Seconds until the device has worked `own` seconds for this tenant.

        Meanwhile every other tenant has its share, weight by weight, or all of its work where that is less: the
        batcher's deficit round robin with turns too short to see.
        """
        others = ((name, seconds) for name, seconds in self.tenants().items() if name != tenant)
        return own + sum(min(seconds, own * self.weights[name] / weight) for name, seconds in others)


def merge(old: ModelState, new: ModelState) -> ModelState:
    """What is known of a model in one process after `new`: the rate of a size stays until it is measured again."""
    if old.state == new.state:
        new = replace(new, seconds=new.seconds or old.seconds, device_bytes=new.device_bytes or old.device_bytes)
    return replace(new, rates={**old.rates, **new.rates})


def best(states: Iterable[ModelState]) -> ModelState:
    """The most useful of a model's states on several workers."""
    return min(states, key=lambda known: _USEFUL.index(known.state))


def choose(backlogs: Sequence[Backlog], models: Sequence[str], max_wait: float) -> int:
    """Index of the worker that gets to a request for these models first, with a queue under max_wait if any has one.

    NOTE: a worker on which a model failed answers at once and so never has a queue; by its queue alone it would draw
    every request. Between equals, the one that has the model, so that an idle server does not load it twice.
    """
    states = [backlog.worst(models) for backlog in backlogs]
    load = max((known.seconds for known in states if known.state == "ready"), default=0.0)

    def rank(index: int) -> tuple[bool, bool, float, bool]:
        state, ahead = states[index].state, backlogs[index].seconds
        wait = ahead if state == "ready" else ahead + load
        return state == "failed", ahead > max_wait, wait, state not in ("ready", "loading")

    return min(range(len(backlogs)), key=rank)


def admit(
    job: Job, chosen: Backlog, backlogs: Sequence[Backlog], *, max_wait: float, limit: float | None, absent: float = 0.0
) -> None:
    """Estimate what the job may expect behind `chosen`, one of the live workers' backlogs, or refuse it.

    absent: seconds until there is a worker. The job's own cost does not count against it: else large requests would
    never enter. Raises RateLimited when its tenant has more than `limit` device seconds queued, or more than its share
    of a busy queue; Unavailable when the wait is over max_wait seconds, or too long for the deadline; DeadlineExceeded
    when an idle device would miss that.
    """
    kind, delivery = kind_of(job), job.request.delivery
    _check_share(delivery, chosen, backlogs, max_wait, limit)
    own = chosen.tenants().get(delivery.tenant, 0.0)
    wait = absent + chosen.wait(delivery.tenant, delivery.weight, own)
    if wait > max_wait:
        words = f"The queue is about {wait:.0f} seconds long."
        raise Unavailable(words, retry_after=after(wait - max_wait), code="overloaded")
    cost = len(job.request.images) * chosen.image(kind)
    # Others have their turns while it waits and while it runs: both are in its wait.
    finish = absent + chosen.wait(delivery.tenant, delivery.weight, chosen.before(kind) + cost)
    estimate = Estimate(finish - cost, len(chosen.jobs), cost)
    if delivery.deadline is not None and all(chosen.rates.measured(key.model) for key, _ in kind.legs):
        _check_deadline(estimate, delivery.deadline - time.monotonic())
    job.estimate = estimate


def _check_share(
    delivery: Delivery, chosen: Backlog, backlogs: Sequence[Backlog], max_wait: float, limit: float | None
) -> None:
    own = sum(backlog.tenants().get(delivery.tenant, 0.0) for backlog in backlogs)
    weights = Counter({delivery.tenant: delivery.weight})
    for backlog in backlogs:
        weights |= Counter({name: weight for name, weight in backlog.weights.items() if name != delivery.tenant})
    share = len(backlogs) * delivery.weight / sum(weights.values())
    if limit is not None and own > limit:
        words = f"This key has about {own:.0f} seconds of work queued, and may have {limit:.0f}."
        raise RateLimited(words, retry_after=after((own - limit) / share))
    busy = len(weights) > 1 and chosen.seconds > BUSY * max_wait
    if busy and own > share * max_wait:
        words = f"This key has about {own:.0f} seconds of work queued; its share of the queue is full."
        raise RateLimited(words, retry_after=after(own / share - max_wait))


def _check_deadline(estimate: Estimate, left: float) -> None:
    if estimate.cost > left:
        words = f"This takes about {estimate.cost:.1f} seconds here, and the deadline is in {left:.1f}."
        raise DeadlineExceeded(words)
    late = estimate.wait + estimate.cost - left
    if late > 0:
        words = f"The wait of about {estimate.wait:.1f} seconds leaves too little before the deadline in {left:.1f}."
        raise Unavailable(words, retry_after=after(late), code="overloaded")


def after(seconds: float) -> float:
    """What Retry-After says where so many seconds must pass: 1 to 120, spread so that not all come back at once."""
    return min(120.0, max(1.0, seconds) * random.uniform(1.0, 1.5))
