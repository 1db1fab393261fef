"""With one tenant the order is the plain one, by lists alone: least remaining work first with an age limit."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.queue import AGE_LIMIT
from app.engine.row import Caps, Row, Work
from app.request import Key
from tests.parts.simulation import KEY, OTHER, Simulation, row


class PlainBatcher:
    """The plain twin: sorts everything at every choice and knows no tenants."""

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self.rows: list[Row] = []
        self.finished: list[Row] = []
        self.encoded_last = False

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def start(self, row: Row) -> None:
        row.stage = "started"

    def finish(self, row: Row) -> None:
        self.rows.remove(row)
        self.finished.append(row)

    def remove(self, row: Row) -> None:
        self.finished.remove(row)

    def charge(self, work: Work, seconds: float) -> None:
        pass

    def next(self, now: float) -> Work | None:
        work = self.decode() or self.step(now)
        self.encoded_last = work is not None and work.phase == "encode"
        return work

    def decode(self) -> Work | None:
        if not self.finished:
            return None
        key = self.finished[0].key
        return Work("decode", key, [each for each in self.finished if each.key == key][: self.caps.decode])

    def step(self, now: float) -> Work | None:
        offers = [offer for key in (KEY, OTHER) if (offer := self.candidates(key, now))]
        if self.encoded_last and any(each.stage == "started" for each in self.rows):
            offers = [kept for offer in offers if (kept := [each for each in offer if each.stage == "started"])]
        if not offers:
            return None
        rows = min(offers, key=lambda offer: self.order(offer[0], now))
        chosen, left = [], self.caps.passes
        for each in rows:
            if left > 0 and (each.passes <= left or not chosen):
                chosen.append(each)
                left -= each.passes
        entering = [each for each in chosen if each.stage == "waiting"]
        if not entering:
            return Work("denoise", rows[0].key, chosen)
        following = [each for each in rows if each.stage == "waiting" and each not in entering]
        started = [each for each in self.rows if each.key == rows[0].key and each.stage == "started"]
        early = self.caps.encode // 2 - len([each for each in started if each.line == 0])
        room = self.caps.slots - self.caps.slots // 4 - len(started) - len(entering)
        first = entering + following[: max(0, min(early, room))]
        return Work("encode", rows[0].key, first[: self.caps.encode])

    def candidates(self, key: Key, now: float) -> list[Row]:
        started = [each for each in self.rows if each.key == key and each.stage == "started"]
        waiting = [each for each in self.rows if each.key == key and each.stage == "waiting"]
        room = self.caps.slots - len(started)
        waiting = sorted(waiting, key=lambda each: self.order(each, now))[: max(0, min(self.caps.passes, room))]
        if room <= self.caps.slots // 4:
            shortest = min((each.remaining for each in started), default=math.inf)
            waiting = [each for each in waiting if each.remaining < shortest]
        return sorted(started + waiting, key=lambda each: self.order(each, now))

    def order(self, each: Row, now: float) -> tuple[float, ...]:
        if now - each.arrived - each.served > AGE_LIMIT * each.lines * each.passes * self.caps.rate:
            return (0, each.arrived, each.sequence)
        return (1, each.remaining, -each.request.delivery.priority, each.deadline, each.arrived, each.sequence)


ROWS = st.tuples(
    st.integers(0, 30),  # the turn at which it comes
    st.integers(1, 6),  # steps
    st.booleans(),  # guided
    st.integers(-1, 1),  # priority
    st.sampled_from([None, 5.0, 500.0]),  # deadline
    st.sampled_from([KEY, OTHER]),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=40), st.integers(1, 5), st.integers(2, 12), st.floats(0.01, 1.0))
def test_the_order_is_that_of_the_plain_twin(
    rows: list[tuple[int, int, bool, int, float | None, Key]], passes: int, slots: int, rate: float
) -> None:
    caps = Caps(passes, 2, 3, slots, rate)
    ours, plain = Simulation(lambda key: caps), Simulation(lambda key: caps)
    plain.batcher = PlainBatcher(caps)  # type: ignore[assignment]
    told: list[list[tuple[str, list[int]] | None]] = []
    for simulation in (ours, plain):
        made = [
            row(steps, guided=guided, key=key, priority=priority, deadline=deadline, tenant="only", weight=2.0)
            for _, steps, guided, priority, deadline, key in rows
        ]
        numbers = {each: number for number, each in enumerate(made)}
        choices: list[tuple[str, list[int]] | None] = []
        for turn in range(31 + 20 * len(rows)):
            simulation.add(*(each for each, (when, *_) in zip(made, rows, strict=True) if when == turn))
            work = simulation.turn()
            chosen = [numbers[each] for each in work.rows] if work else []
            # Who shares a forward has no order in it; who is encoded or decoded first has.
            choices.append(work and (work.phase, sorted(chosen) if work.phase == "denoise" else chosen))
        assert len(simulation.ended) == len(rows)
        told.append(choices)
    assert told[0] == told[1]
