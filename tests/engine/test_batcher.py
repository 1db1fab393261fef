"""The order of work, counted in ticks on a virtual clock: no network, no tensors."""

from __future__ import annotations

import gc
import itertools

import pytest

from app.engine.queue import AGE_LIMIT
from app.engine.row import Caps, Row
from app.request import Key
from tests.parts.simulation import OTHER, Simulation, fixed, row


def test_seven_requests_share_their_forwards() -> None:
    simulation = Simulation(fixed(16))
    simulation.add(*(row(steps, guided=guided) for steps, guided in SEVEN))
    simulation.run()
    assert len(simulation.ended) == 7
    assert len(simulation.forwards) <= 28 + 4


SEVEN = [(1, False), (2, True), (4, False), (10, True), (20, False), (28, True), (28, True)]


def test_a_row_joins_at_the_next_step() -> None:
    simulation = Simulation(fixed(16))
    simulation.add(row(20))
    for _ in range(6):
        simulation.turn()
    late = row(5)
    simulation.add(late)
    before = len(simulation.forwards)
    while late not in simulation.ended:
        simulation.turn()
    assert late in simulation.forwards[before]


def test_rows_whose_adapter_is_away_let_others_pass() -> None:
    """Also where they are the best of all, and more than a forward takes."""
    simulation = Simulation(fixed(8), away="x")
    waiting = [row(2, adapters=(("x", 0.5),)) for _ in range(40)]
    passing = [row(4, adapters=(("y", 0.5),)), row(4), row(50)]
    simulation.add(*waiting, *passing)
    simulation.run()
    assert simulation.ended.keys() == set(passing) and {one.stage for one in waiting} == {"waiting"}
    assert len(simulation.forwards[0]) == len(passing)
    assert {one.adapters for one in simulation.batcher.heads()} == {("x",)}


def test_a_short_row_does_not_wait_for_long_ones_at_the_cap() -> None:
    simulation = Simulation(fixed(8))
    simulation.add(*(row(50) for _ in range(8)))
    for _ in range(10):
        simulation.turn()
    short = row(4)
    simulation.add(short)
    before = len(simulation.forwards)
    while short not in simulation.ended:
        simulation.turn()
    without = [rows for rows in simulation.forwards[before:] if short not in rows]
    assert len(without) <= 2


def test_a_long_row_ends_within_its_age_limit_under_endless_short_arrivals() -> None:
    simulation = Simulation(fixed(2))
    long = row(50)
    simulation.add(long)
    while long not in simulation.ended and simulation.now < 10_000:
        if simulation.batcher.waiting < 4:
            simulation.add(row(4), row(4))
        simulation.turn()
    assert simulation.ended[long] <= (AGE_LIMIT + 1) * 50 + 2
    assert any(long not in rows for rows in simulation.forwards), "nothing ever went before the long row"


def test_without_the_age_limit_the_same_stream_starves_the_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.queue.AGE_LIMIT", float("inf"))
    simulation = Simulation(fixed(2))
    long = row(50)
    simulation.add(long)
    while long not in simulation.ended and simulation.now < 1_000:
        if simulation.batcher.waiting < 4:
            simulation.add(row(4), row(4))
        simulation.turn()
    assert long not in simulation.ended


def test_least_remaining_first_then_priority_then_arrival() -> None:
    simulation = Simulation(fixed(1))
    long, plain, favoured = row(9), row(5), row(5, priority=3)
    simulation.add(long, plain, favoured)
    simulation.run()
    assert sorted(simulation.ended, key=simulation.ended.__getitem__) == [favoured, plain, long]


def test_a_guided_row_counts_two_passes() -> None:
    simulation = Simulation(fixed(4))
    simulation.add(*(row(3, guided=True) for _ in range(3)), row(3))
    simulation.run()
    assert max(sum(each.passes for each in rows) for rows in simulation.forwards) == 4


def test_a_row_wider_than_the_cap_still_runs() -> None:
    simulation = Simulation(fixed(1))
    wide = row(2, guided=True)
    simulation.add(wide)
    simulation.run()
    assert wide in simulation.ended


def test_rows_of_an_absent_model_wait_and_the_others_run() -> None:
    present: set[str] = {"model"}
    simulation = Simulation(lambda key: Caps(4, 8, 4, 16, 1.0) if key.model in present else None)
    here, absent = row(3), row(1, key=OTHER)
    simulation.add(here, absent)
    simulation.run()
    assert here in simulation.ended and absent not in simulation.ended
    present.add("other")
    simulation.run()
    assert absent in simulation.ended


def test_two_keys_never_share_a_forward_and_the_shorter_goes_first() -> None:
    simulation = Simulation(fixed(8))
    long, short = row(20), row(2, key=OTHER)
    simulation.add(long, short)
    simulation.run()
    assert all(len({each.key for each in rows}) == 1 for rows in simulation.forwards)
    assert simulation.ended[short] == 2


def test_never_two_encodes_in_a_row_while_rows_wait_to_be_denoised() -> None:
    simulation = Simulation(fixed(8, encode=2))
    simulation.add(*(row(6) for _ in range(8)))
    simulation.run()
    pairs = list(itertools.pairwise(simulation.phases))
    assert ("encode", "encode") not in pairs
    assert len(simulation.ended) == 8


def test_an_encode_takes_along_who_is_next_and_no_more_than_may_start() -> None:
    """Two guided rows fill a forward of four passes."""
    for encode, slots, taken in ((8, 16, 4), (3, 16, 3), (1, 16, 1), (8, 3, 3)):
        simulation = Simulation(fixed(4, slots=slots, encode=encode))
        rows = [row(9 - number, guided=True) for number in range(6)]
        simulation.add(*rows)
        work = simulation.turn()
        assert work is not None and (work.phase, work.rows) == ("encode", rows[: -taken - 1 : -1])
    simulation = Simulation(fixed(4))
    rows = [row(9 - number, guided=True) for number in range(6)]
    simulation.add(*rows)
    simulation.run()
    assert simulation.phases.count("encode") == 2 and simulation.forwards[0] == rows[:-3:-1]


def test_a_crowd_is_encoded_a_few_rows_ahead_and_leaves_the_last_slots_alone() -> None:
    simulation = Simulation(fixed(8, slots=36, encode=8))
    simulation.add(*(row(50, guided=True) for _ in range(40)))
    most, ends = 0, []
    for turn in range(400):
        if turn % 40 == 3:
            ends.append(row(4))
            simulation.add(ends[-1])
        simulation.turn()
        most = max(most, len(simulation.batcher.started))
    assert 8 < most <= 4 + 4 + 4, "four run, four are ahead, and a few were overtaken"
    favoured = row(20, priority=1)
    simulation.add(favoured)
    before = simulation.now
    while favoured not in simulation.ended:
        simulation.turn()
    assert simulation.ended[favoured] - before <= 21
    small = Simulation(fixed(8, slots=12, encode=8))
    small.add(*(row(50, guided=True) for _ in range(40)))
    for _ in range(100):
        small.turn()
        assert len(small.batcher.started) <= 9


def test_arrivals_of_other_sizes_do_not_keep_a_started_row_from_its_steps() -> None:
    """Each arrival is shorter than all before and of a key of its own, so each would be encoded first."""
    simulation = Simulation(fixed(4))
    long = row(20)
    simulation.add(long)
    simulation.turn()
    simulation.turn()
    for number in range(12):
        simulation.add(row(15 - number, key=Key("model", 64, 16 * (number + 1), 24)))
        simulation.turn()
    assert not any(pair == ("encode", "encode") for pair in itertools.pairwise(simulation.phases))


def test_slots_bound_what_is_started_and_short_rows_keep_a_share() -> None:
    simulation = Simulation(fixed(4, slots=8))
    simulation.add(*(row(60 - number) for number in range(30)))
    most = 0
    for _ in range(60):
        simulation.turn()
        most = max(most, simulation.batcher.running)
    assert most <= 8
    short = row(2)
    simulation.add(short)
    before = len(simulation.forwards)
    while short not in simulation.ended:
        simulation.turn()
    assert len(simulation.forwards) - before <= 3


def holding(slots: int, *tenants: str) -> Simulation:
    """A row of each of these tenants has started, and each leaves before those before it."""
    simulation = Simulation(fixed(8, slots=slots, encode=1))
    for number, tenant in enumerate(tenants):
        simulation.add(row(200 - 10 * number, tenant=tenant))
        simulation.turn()
        simulation.turn()
    assert len(simulation.batcher.started) == len(tenants) and simulation.phases[-1] == "denoise"
    return simulation


def starts_now(simulation: Simulation, longer: int, tenant: str = "") -> bool:
    """Whether a row starts that leaves so many steps after the first of those that run."""
    late = row(min(each.remaining for each in simulation.batcher.started) + longer, tenant=tenant)
    simulation.add(late)
    work = simulation.turn()
    assert work is not None and work.phase == ("encode" if late.stage == "started" else "denoise")
    return late.stage == "started"


@pytest.mark.parametrize(
    ("held", "longer", "starts"),
    [(5, 1, True), (6, 1, False), (6, 0, False), (6, -1, True), (7, 0, False), (7, -1, True), (8, -1, False)],
)
def test_the_last_quarter_of_the_slots_is_for_rows_that_leave_before_all_others(
    held: int, longer: int, starts: bool
) -> None:
    """Six of eight slots are for anybody."""
    assert starts_now(holding(8, *("",) * held), longer) is starts


@pytest.mark.parametrize(
    ("slots", "mine", "theirs", "starts"),
    [(8, 4, 1, True), (8, 4, 2, False), (8, 2, 4, True), (8, 3, 3, False), (6, 2, 3, True)],
)
def test_a_tenant_takes_of_the_last_quarter_up_to_its_share_of_the_others(
    slots: int, mine: int, theirs: int, starts: bool
) -> None:
    simulation = holding(slots, *("mine",) * mine, *("theirs",) * theirs)
    assert starts_now(simulation, 1, "mine") is starts


@pytest.mark.parametrize(("slots", "taken"), [(7, 6), (8, 6), (9, 7), (11, 8)])
def test_rows_that_are_encoded_early_never_take_a_slot_of_the_last_quarter(slots: int, taken: int) -> None:
    """Four guided rows fill the forward; up to four more are encoded with them."""
    simulation = Simulation(fixed(8, slots=slots, encode=8))
    simulation.add(*(row(50, guided=True) for _ in range(12)))
    work = simulation.turn()
    assert work is not None and (work.phase, len(work.rows)) == ("encode", taken)


def test_removed_rows_leave_no_trace_wherever_they_stand() -> None:
    simulation = Simulation(fixed(2))
    rows = [row(5) for _ in range(6)]
    simulation.add(*rows)
    for _ in range(3):
        simulation.turn()
    assert {each.stage for each in rows} == {"waiting", "started"}
    for each in rows:
        simulation.batcher.remove(each)
        simulation.batcher.remove(each)
    assert (simulation.batcher.waiting, simulation.batcher.running) == (0, 0)
    assert simulation.turn() is None


def test_rows_that_leave_while_they_wait_are_forgotten() -> None:
    """A stream of long requests that are cancelled behind short ones must not pile up in the heaps."""
    simulation = Simulation(fixed(2))
    simulation.add(*(row(1000) for _ in range(2)))
    simulation.turn()
    for _ in range(500):
        leaving = row(2000, deadline=1e12)
        simulation.add(leaving)
        simulation.turn()
        assert simulation.batcher.heads() == [leaving]
        simulation.batcher.remove(leaving)
    assert simulation.batcher.waiting == 0 and not simulation.batcher.heads()
    del leaving
    rows = [one for one in gc.get_objects() if type(one) is Row and one.deadline == 1e12]
    assert len(rows) < 50


def test_ten_thousand_waiting_rows_do_not_make_a_choice_slower_by_rows() -> None:
    """The choice looks at a cap's worth of the heap, not at the queue: counted in rows touched."""
    simulation = Simulation(fixed(4))
    simulation.add(*(row(3 + number % 40) for number in range(10_000)))
    simulation.turn()
    assert simulation.ordered(turns=10) <= 10 * 64
