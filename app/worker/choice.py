"""Choice: which of the workers a new request goes to.

Knows nothing of processes, and of a request only the model that it names; whether it may enter is not asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.errors import NoWorker
from app.worker.keeper import Keeper

Rank = tuple[bool, bool, float, bool]


def choose(keepers: Sequence[Keeper], model: str, max_wait: float) -> Keeper:
    """The live worker that will get to a request for this model first, one with a queue under max_wait if there is any.

    Raises NoWorker with retry_after, seconds.
    """
    live = [keeper for keeper in keepers if keeper.live]
    if not live:
        wait = min(keeper.back_in for keeper in keepers)
        raise NoWorker("No engine process is running just now.", retry_after=max(1.0, wait))
    return min(live, key=ranking(live, model, max_wait))


def ranking(live: Sequence[Keeper], model: str, max_wait: float) -> Callable[[Keeper], Rank]:
    """The order in which workers are chosen, least first.

    NOTE: a worker on which the model failed answers at once and so never has a queue; by its queue alone it would draw
    every request. Between equals, the one that has the model, so that an idle server does not load it twice.
    """
    load = max((keeper.states[model].seconds for keeper in live if keeper.state(model) == "ready"), default=0.0)

    def rank(keeper: Keeper) -> Rank:
        state, ahead = keeper.state(model), keeper.queued_seconds
        wait = ahead if state == "ready" else ahead + load
        return state == "failed", ahead > max_wait, wait, state not in ("ready", "loading")

    return rank
