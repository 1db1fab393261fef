"""Turns: models that do not fit together share the device in time, and none waits for ever."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

from app.engine.batcher import ALL, Turns
from app.engine.row import Row
from app.pool.policy import Kept, Parts
from app.report import Phase
from app.request import Key
from tests.parts.engine import request


class Shelf:
    """A pool of which a test says what is on the device."""

    def __init__(self, *here: str) -> None:
        self.here, self.parts = set(here), set[tuple[str, Phase]]()
        self.whole, self.blocked = True, False
        self.adapters = set[str]()

    def resident(self, model_id: str, phase: Phase, adapters: Sequence[str] = ()) -> bool:
        if not self.adapters.issuperset(adapters):
            return False
        return model_id in self.here or (model_id, phase) in self.parts

    def fits(self, model_id: str, adapters: Sequence[str] = ()) -> bool:
        return self.whole

    def need(self, waiting: Sequence[Parts], kept: Collection[Kept], urgent: Sequence[Parts]) -> None:
        self.asked = [one[:2] for one in urgent], [one[:2] for one in waiting], frozenset(kept)


class Plan(NamedTuple):
    """What the pool was asked for, and which models take no new rows."""

    urgent: list[tuple[str, tuple[Phase, ...]]]
    needs: list[tuple[str, tuple[Phase, ...]]]
    kept: frozenset[Kept]
    held: frozenset[str]


class Planned(Turns):
    rows: Sequence[Row] = ()

    def plan(self, finished: Sequence[Row], started: Sequence[Row], now: float) -> Plan:
        """With the first of the rows of each model as what waits."""
        heads = {row.kit: row for row in reversed(self.rows)}.values()
        held = self.ask(sorted(heads, key=lambda row: row.sequence), finished, started, now)
        return Plan(*self._pool.asked, frozenset(model for model, _ in held))  # type: ignore[attr-defined]


numbers = itertools.count()


def row(model: str, arrived: float = 0.0, *adapters: str) -> Row:
    asked = request("r", model=model, adapters=tuple((name, 0.5) for name in adapters))
    return Row(asked, 0, Key(model, 32, 32, 24), 8, arrived, next(numbers))


def running(model: str) -> Row:
    """A started row with its network."""
    started, lease = row(model), object()
    started.lease = lease  # type: ignore[assignment]
    return started


def turns(shelf: Shelf, *rows: Row, measured: bool = True) -> Planned:
    made = Planned(shelf, {row.key for row in rows if measured})  # type: ignore[arg-type]
    made.rows = rows
    return made


def test_models_that_are_there_hold_nobody() -> None:
    plan = turns(Shelf("a", "b"), row("a"), row("b")).plan([], [], 100.0)
    assert plan == ([], [], {"a", "b"}, frozenset())


def test_an_absent_model_is_needed_whole_and_the_oldest_first() -> None:
    plan = turns(Shelf(), row("b"), row("a"), row("b")).plan([], [], 0.0)
    assert plan.needs == [("b", ALL), ("a", ALL)] and not plan.kept


def test_one_part_at_a_time_where_they_do_not_fit_together() -> None:
    shelf = Shelf()
    shelf.whole = False
    assert turns(shelf, row("a")).plan([], [], 0.0).needs == [("a", ("encode",))]
    assert turns(shelf, row("a"), measured=False).plan([], [], 0.0).needs == [("a", ("denoise",))]
    shelf.parts = {("a", "encode")}
    assert turns(shelf, row("a")).plan([], [], 0.0).needs == []


def test_rows_that_hold_memory_come_before_those_that_wait() -> None:
    plan = turns(Shelf(), row("c")).plan([row("b")], [row("a"), row("a")], 0.0)
    assert plan.urgent == [("b", ("decode",)), ("a", ("denoise",))] and plan.needs == [("c", ALL)]


def test_the_running_model_keeps_the_device_for_one_image_or_one_load() -> None:
    shelf = Shelf("a")
    shelf.blocked = True
    made = turns(shelf, row("a"), row("b", arrived=10.0))
    made.served("a", 2.0)
    made.loaded("b", 5.0)
    assert made.plan([], [], 10.0).kept == {"a"}
    assert made.plan([], [], 14.9).held == frozenset()
    plan = made.plan([], [], 15.1)
    assert plan.kept == frozenset() and plan.held == {"a"}
    shelf.blocked = False
    assert made.plan([], [], 15.2).held == frozenset(), "while the other loads, who runs may take new rows"


def test_a_model_that_comes_in_has_its_own_time_first() -> None:
    shelf = Shelf("a")
    shelf.blocked = True
    made = turns(shelf, row("a"), row("b"))
    made.plan([], [], 0.0)
    for model in ("a", "b"):
        made.served(model, 2.0)
    assert made.plan([], [], 2.1).held == {"a"}
    shelf.here = {"b"}
    plan = made.plan([], [], 3.0)
    assert plan.kept == {"b"} and not plan.held and plan.needs == [("a", ALL)]
    assert made.plan([], [], 5.1).held == {"b"}


def test_rows_that_hold_memory_make_room_for_themselves() -> None:
    """A started row without its network, or a finished one without its VAE: who stands in its way takes no new rows."""
    shelf = Shelf("a")
    shelf.blocked = True
    made = turns(shelf, row("a"))
    for finished, started in (([], [running("a"), row("b")]), ([row("b")], [running("a")])):
        plan = made.plan(finished, started, 0.0)
        assert "a" in plan.held and not plan.kept
    shelf.here = {"a", "b"}
    assert not made.plan([row("b")], [running("a")], 0.0).held


def test_the_parts_of_one_model_taking_turns_do_not_renew_its_time() -> None:
    shelf = Shelf()
    shelf.whole, shelf.blocked = False, True
    made = turns(shelf, row("a"), row("b"))
    made.served("a", 2.0)
    shelf.parts = {("a", "encode")}
    made.plan([], [], 0.0)
    shelf.parts = {("a", "denoise")}
    made.plan([], [running("a")], 1.5)
    shelf.parts = {("a", "encode")}
    assert "a" in made.plan([], [running("a")], 2.1).held


def test_who_made_room_is_not_brought_back_first_although_its_row_is_the_oldest() -> None:
    shelf = Shelf("a")
    made = turns(shelf, row("a", 0.0), row("b", 1.0))
    made.served("a", 2.0)
    assert made.plan([], [], 1.0).needs == [("b", ALL)]
    shelf.here = set()  # b is on its way, and a has left for it
    assert made.plan([], [], 2.0).needs == [("a", ALL), ("b", ALL)], "a's turn is not over yet"
    assert made.plan([], [], 3.5).needs == [("b", ALL), ("a", ALL)]
    shelf.here = {"b"}
    assert made.plan([], [], 4.0).needs == [("a", ALL)]


def test_an_adapter_takes_turns_with_others_of_its_model_and_plain_rows_go_on() -> None:
    shelf = Shelf("a")
    shelf.adapters, shelf.blocked = {"x", "y"}, True
    rows = row("a"), row("a", 0.0, "x"), row("a", 0.0, "x", "y"), row("a", 1.0, "z")
    made = turns(shelf, *rows)
    made.served("a", 2.0)
    plan = made.plan([], [], 1.0)
    assert plan.needs == [("a", ALL)] and plan.kept == {"a", ("a", "x"), ("a", "y")}
    held = made.ask(rows, [], [], 3.1)
    assert held == {("a", ("x",)), ("a", ("x", "y"))}, "who has what z needs no room of"
    assert shelf.asked[2] == {"a"}
    shelf.adapters = {"x", "z"}
    assert not made.ask(rows[:2] + rows[3:], [], [], 3.2), "x and z are both there"


def test_rows_that_need_an_adapter_only_one_of_which_is_there_wait() -> None:
    shelf = Shelf("a")
    shelf.adapters = {"x"}
    assert turns(shelf, row("a", 0.0, "x", "y")).plan([], [], 0.0).needs == [("a", ALL)]
    shelf.adapters = {"x", "y"}
    assert not turns(shelf, row("a", 0.0, "x", "y")).plan([], [], 0.0).needs


def test_kits_that_are_gone_are_forgotten() -> None:
    """Bodies choose sets of adapters, so there is no end of kits."""
    turns = Planned(Shelf("a"), ())
    for number in range(1000):
        turns._pool.adapters = {f"{number}"}  # type: ignore[attr-defined]
        turns.rows = [row("a", 0.0, f"{number}")]
        turns.plan([], [], float(number))
    assert sum(len(one) for one in vars(turns).values() if isinstance(one, set | dict)) < 10
