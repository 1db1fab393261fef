"""The policy: what leaves so that others fit, and where it goes, with components that only count."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from app.pool.memory import Component, Place
from app.pool.policy import Model, claim, here
from app.pool.pool import Pool


class Counted:
    """A component without weights. `moves` is what was done to it."""

    def __init__(self, name: str, size: int, used: float, place: Place = "device", *, breaks: bool = False) -> None:
        self.name, self.bytes, self.used, self.place, self.breaks = name, size, used, place, breaks
        self.moving, self.leases, self.key = False, 0, name
        self.owners = {name}
        self.moves: list[str] = []

    def arrive(self) -> None:
        self.moves.append(f"from {self.place}")
        if self.breaks:
            raise OSError("the disk is gone")

    def park(self) -> bool:
        self.moves.append("park")
        return not self.breaks

    def leave(self) -> None:
        self.moves.append("leave")


def store(budget: int, host: int, *components: Counted) -> Pool:
    made = Pool({}, "cpu", torch.float32, budget=budget)
    made.policy.host = host
    made.policy.components = [cast(Component, one) for one in components]
    return made


def names(found: list[Component] | None) -> list[str] | None:
    return None if found is None else [cast(Any, one).name for one in found]


def everything(one: Component) -> bool:
    return True


def test_the_longest_unused_leave_and_no_more_than_needed() -> None:
    old, older, new = Counted("old", 30, 2), Counted("older", 30, 1), Counted("new", 30, 3)
    fresh = Counted("fresh", 40, 0, "away")
    shelf = store(100, 0, old, older, new, fresh)
    assert names(shelf.policy.room_for([cast(Component, fresh)])) == ["older"]
    fresh.bytes = 60
    assert names(shelf.policy.room_for([cast(Component, fresh)])) == ["older", "old"]
    fresh.bytes = 10
    assert names(shelf.policy.room_for([cast(Component, fresh)])) == []


def test_what_is_leased_kept_or_wanted_itself_stays() -> None:
    leased, idle = Counted("leased", 50, 1), Counted("idle", 50, 2)
    fresh = Counted("fresh", 50, 0, "away")
    leased.leases = 1
    shelf = store(100, 0, leased, idle, fresh)
    assert names(shelf.policy.room_for([cast(Component, fresh)])) == ["idle"]
    assert shelf.policy.room_for([cast(Component, fresh)], everything) is None
    assert shelf.policy.room_for([cast(Component, fresh), cast(Component, idle)]) is None


def test_what_moves_counts_until_it_has_moved() -> None:
    going, fresh = Counted("going", 60, 1), Counted("fresh", 60, 0, "away")
    shelf = store(100, 0, going, fresh)
    claim([cast(Component, going)])
    assert not here(cast(Component, going)) and shelf.policy.used == 60
    assert shelf.policy.room_for([cast(Component, fresh)]) is None


def test_host_memory_before_the_files_and_its_oldest_give_way() -> None:
    a, b, c = Counted("a", 40, 1), Counted("b", 40, 2), Counted("c", 40, 3)
    shelf = store(1000, 100, a, b, c)
    for one in (a, b, c):
        claim([cast(Component, one)])
        shelf.put_aside(cast(Component, one))
        assert one.place == "host"
    assert [one.place for one in (a, b, c)] == ["away", "host", "host"] and shelf.policy.parked == 80
    assert a.moves == ["park", "leave"] and b.moves == c.moves == ["park"]
    whale = Counted("whale", 101, 4)
    shelf.policy.components.append(cast(Component, whale))
    shelf.put_aside(cast(Component, whale))
    assert whale.place == "away" and whale.moves == ["leave"] and b.place == "host"


def test_bringing_moves_out_then_in_and_says_where_to() -> None:
    old, parked, filed = Counted("old", 50, 1), Counted("parked", 30, 0, "host"), Counted("filed", 20, 0, "away")
    shelf = store(50, 100, old, parked, filed)
    wanted, leaving = [cast(Component, parked), cast(Component, filed)], [cast(Component, old)]
    claim(wanted + leaving)
    shelf.move(wanted, leaving)
    assert parked.moves == ["from host"] and filed.moves == ["from away"]
    assert [one.place for one in (old, parked, filed)] == ["host", "device", "device"]


def test_what_does_not_fit_into_host_memory_after_all_goes_away() -> None:
    old, fresh = Counted("old", 50, 1, breaks=True), Counted("fresh", 50, 0, "away")
    shelf = store(50, 100, old, fresh)
    wanted, leaving = [cast(Component, fresh)], [cast(Component, old)]
    claim(wanted + leaving)
    shelf.move(wanted, leaving)
    assert old.moves == ["park", "leave"] and (old.place, fresh.place) == ("away", "device")


def test_host_memory_counts_what_is_on_its_way_from_it() -> None:
    old, parked = Counted("old", 50, 1), Counted("parked", 60, 0, "host")
    shelf = store(60, 100, old, parked)
    claim([cast(Component, parked), cast(Component, old)])
    assert shelf.policy.parked == 60
    shelf.put_aside(cast(Component, old))
    assert old.place == "away", "60 of 100 are taken until they have come"


def test_a_part_of_a_model_that_failed_counts_while_it_is_leased() -> None:
    leased, idle = Counted("leased", 50, 1), Counted("idle", 50, 2)
    leased.leases = 1
    shelf = store(100, 0, leased, idle)
    leased.owners, idle.owners = {"m"}, {"m"}
    shelf.models["m"] = Model(parts={"leased": cast(Component, leased), "idle": cast(Component, idle)})
    shelf.fail("m", OSError("the disk is gone"))
    assert shelf.policy.used == 50
    assert leased.key is None, "a new load does not take it for its own"
    shelf.release([cast(Component, leased)])
    assert shelf.policy.used == 0 and leased.moves == ["leave"], "nobody has it any more"


def test_a_load_that_breaks_leaves_nothing_moving() -> None:
    good, bad, later = Counted("g", 1, 0, "away"), Counted("b", 1, 0, "away", breaks=True), Counted("l", 1, 0, "away")
    shelf = store(10, 0, good, bad, later)
    wanted = [cast(Component, one) for one in (good, bad, later)]
    claim(wanted)
    with pytest.raises(OSError, match="the disk is gone"):
        shelf.move(wanted, [])
    assert [one.place for one in (good, bad, later)] == ["device", "away", "away"] and shelf.policy.used == 1
