"""The bench of the order of work: its clock, and its plain policies by hand."""

import pytest

from tests.bench.order import LONG, SHORT, Cost, Job, cap_of, continuous, cost_of, facts, static

COST = Cost(1.0, 0.5)


def test_a_job_alone_takes_its_lines_under_every_policy():
    for kind, lines in ((SHORT, 4), (("flow_heun", 10, False), 19)):
        alone = [Job(kind, 3.0)]
        due = 3.0 + lines * COST(2 if kind[2] else 1)
        for ends in (continuous(alone, COST), static(alone, COST, 8), static(alone, COST, 1)):
            assert ends == [pytest.approx(due)]


def test_static_batches_the_oldest_and_its_equals_that_are_there():
    jobs = [Job(LONG, 0.0), Job(SHORT, 0.0), Job(SHORT, 1.0), Job(SHORT, 1000.0)]
    long, pair = 50 * COST(2), 4 * COST(4)
    assert static(jobs, COST, 4) == pytest.approx([long, long + pair, long + pair, 1000.0 + 4 * COST(2)])


def test_the_short_go_first_and_nothing_is_lost():
    jobs = [Job(LONG, 0.0), *(Job(SHORT, 1.0 + number) for number in range(3))]
    cost = cost_of(2, 38.9)
    assert cap_of(cost) == 2
    assert cost(2) / 2 == pytest.approx(0.0389)
    ends = continuous([job._replace(arrives=job.arrives / 100) for job in jobs], cost)
    assert max(ends[1:]) < ends[0] == pytest.approx(62 * cost(2))


def test_facts_are_of_the_times_taken():
    jobs = [Job(SHORT, 1.0), Job(SHORT, 1.0), Job(LONG, 2.0)]
    found = facts(jobs, [3.0, 3.0, 12.0])
    assert (found["p50"], found["mean"], found["long_worst"]) == (2.0, 4.6667, 10.0)
    assert (found["short_p95"], found["jobs_per_s"]) == (2.0, 0.2727)
