"""Admission: whether a request may stand in a worker's queue, by the seconds of device time that are before it.

Knows nothing of processes, and of keys only the name, the weight and the limit.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import DeadlineExceeded, Overloaded, RateLimited
from app.request import Delivery, Request
from app.worker.backlog import Backlog, Kind
from app.worker.jobs import Estimate

BUSY = 0.5
"""The part of MAX_WAIT up to which a queue is open to all, whoever fills it."""


@dataclass(frozen=True)
class Door:
    """What a request must pass. backlogs: of all live workers; max_wait: seconds, of each.

    All is judged by what is ahead, not by that and the request's own cost: else large requests would never enter.
    """

    backlogs: Sequence[Backlog]
    max_wait: float

    def admit(self, request: Request, kind: Kind, chosen: Backlog, position: int, limit: float | None) -> Estimate:
        """What the request may expect behind `chosen`.

        Raises RateLimited when its tenant has more than `limit` device seconds queued, or more than its share of a
        busy queue; Overloaded when the wait is longer than max_wait, or too long for the deadline; DeadlineExceeded
        when even an idle device would not meet that.
        """
        self._check_share(request.delivery, chosen, limit)
        tenant, weight, deadline = request.delivery.tenant, request.delivery.weight, request.delivery.deadline
        own = chosen.tenants().get(tenant, 0.0)
        wait = chosen.wait(tenant, weight, own)
        if wait > self.max_wait:
            raise Overloaded(f"The queue is about {wait:.0f} seconds long.", retry_after=after(wait - self.max_wait))
        cost = len(request.images) * chosen.image(kind)
        # Others have their turns while it waits and while it runs: both are in its wait.
        finish = chosen.wait(tenant, weight, chosen.before(kind) + cost)
        estimate = Estimate(finish - cost, position, cost)
        if deadline is not None and chosen.measured(request.recipe.model):
            _check_deadline(estimate, deadline - time.monotonic())
        return estimate

    def _check_share(self, delivery: Delivery, chosen: Backlog, limit: float | None) -> None:
        own = sum(backlog.tenants().get(delivery.tenant, 0.0) for backlog in self.backlogs)
        weights = Counter({delivery.tenant: delivery.weight})
        for backlog in self.backlogs:
            weights |= Counter({name: weight for name, weight in backlog.weights.items() if name != delivery.tenant})
        share = len(self.backlogs) * delivery.weight / sum(weights.values())
        if limit is not None and own > limit:
            words = f"This key has about {own:.0f} seconds of work queued, and may have {limit:.0f}."
            raise RateLimited(words, retry_after=after((own - limit) / share))
        busy = len(weights) > 1 and chosen.seconds > BUSY * self.max_wait
        if busy and own > share * self.max_wait:
            words = f"This key has about {own:.0f} seconds of work queued; its share of the queue is full."
            raise RateLimited(words, retry_after=after(own / share - self.max_wait))


def _check_deadline(estimate: Estimate, left: float) -> None:
    if estimate.cost > left:
        words = f"This takes about {estimate.cost:.1f} seconds here, and the deadline is in {left:.1f}."
        raise DeadlineExceeded(words)
    late = estimate.wait + estimate.cost - left
    if late > 0:
        words = f"The wait of about {estimate.wait:.1f} seconds leaves too little before the deadline in {left:.1f}."
        raise Overloaded(words, retry_after=after(late))


def after(seconds: float) -> float:
    """What Retry-After says where so many seconds must pass: 1 to 120, spread so that not all come back at once."""
    return min(120.0, max(1.0, seconds) * random.uniform(1.0, 1.5))
