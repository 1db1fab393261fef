"""Cores: a forward gives up one thread for each core that others keep busy, and takes it back afterwards."""

import os
import subprocess
import sys
import time
from typing import ClassVar

import pytest
import torch

from app.pool.budget import LOOK, Cores, use_threads
from app.report import Tick
from tests.parts.engine import Bench, FakeFamily, FakePool, card, request

CORES = 8
HERTZ = os.sysconf("SC_CLK_TCK")


class Machine:
    """Eight cores in a file like /proc/stat, a clock, and the processor time of this process."""

    def __init__(self, folder):
        self.file, self.now, self.own, self.busy = folder / "stat", 0.0, 0.0, 0.0
        self.write()

    def pass_time(self, seconds, own, others, nice=0.0):
        """own, others, nice: cores that are used in this time."""
        self.now += seconds
        self.own += own * seconds
        self.busy += (own + others) * seconds
        self.write(nice * seconds)

    def write(self, nice=0.0):
        each, low = round(self.busy * HERTZ / CORES), round(nice * HERTZ / CORES)
        lines = ["cpu  9 9 9 9 9 9 9 9 9 9"]
        lines += [f"cpu{core} {each} {low} 0 {int(1e6)} 0 0 0 0 0 0" for core in range(CORES)]
        lines += [f"cpu{CORES} {int(1e9 * self.now)} 0 0 0 0 0 0 0 0 0", "intr 1 2 3"]
        self.file.write_text("\n".join(lines))

    def cores(self, most):
        return Cores(most, clock=lambda: self.now, used=lambda: self.own, stat=self.file)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    before = torch.get_num_threads()
    yield Machine(tmp_path)
    use_threads(before)


@pytest.mark.parametrize(
    ("most", "own", "others", "threads"),
    [
        (8, 8.0, 0.0, 8),
        (8, 7.7, 0.3, 8),  # the front encodes a picture now and then
        (8, 7.5, 0.5, 7),  # one loop that shares a core with one of our threads
        (7, 7.0, 1.0, 7),
        (8, 7.0, 1.0, 7),
        (8, 4.0, 4.0, 4),
        (8, 0.5, 40.0, 1),
        (2, 2.0, 1.0, 2),  # of two engines on eight cores
        (2, 0.5, 7.5, 1),
        (8, 3.0, -0.2, 8),  # the kernel counts in ticks
    ],
)  # fmt: skip
def test_each_busy_core_costs_a_thread(machine, most, own, others, threads):
    cores = machine.cores(most)
    machine.pass_time(2 * LOOK, own, others)
    cores.adapt()
    assert cores.threads == threads
    if threads != most:
        assert torch.get_num_threads() == threads


def test_the_threads_come_back_when_the_others_are_gone(machine):
    cores = machine.cores(8)
    seen = []
    for others in (0.0, 3.0, 3.0, 0.0, 1.0, 0.0):
        machine.pass_time(2 * LOOK, 2.0, others)
        cores.adapt()
        seen.append(cores.threads)
    assert seen == [8, 5, 5, 8, 7, 8]


def test_a_look_too_early_changes_nothing(machine):
    cores = machine.cores(8)
    machine.pass_time(LOOK / 2, 0.0, 8.0)
    cores.adapt()
    assert cores.threads == 8
    machine.pass_time(LOOK, 0.0, 8.0)
    cores.adapt()
    assert cores.threads == 1


def test_processes_of_a_low_priority_do_not_count(machine):
    cores = machine.cores(8)
    machine.pass_time(2 * LOOK, 0.0, 0.0, nice=8.0)
    cores.adapt()
    assert cores.threads == 8


@pytest.mark.parametrize("text", [None, "", "cpu0 1 2", "cpu0 a b c d e f g h"])
def test_a_system_that_does_not_say_keeps_its_threads(machine, text):
    machine.file.unlink()
    if text is not None:
        machine.file.write_text(text)
    cores = machine.cores(3)
    machine.now += 1.0
    cores.adapt()
    assert cores.threads == 3


def test_a_niced_process_counts_those_of_its_kind(machine, monkeypatch):
    monkeypatch.setattr(os, "nice", lambda _: 10)
    cores = machine.cores(8)
    machine.pass_time(2 * LOOK, 0.0, 0.0, nice=5.0)
    cores.adapt()
    assert cores.threads == 3


@pytest.mark.slow
def test_a_loop_on_this_machine_is_seen():
    """The real /proc/stat: all cores busy with loops of others leave one thread."""
    count = len(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        cores, until = Cores(max(2, count)), time.monotonic() + 60
        while cores.threads > 1 and time.monotonic() < until:
            time.sleep(0.5)
            cores.adapt()
        assert cores.threads == 1
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        use_threads(1)


class Counted(Cores):
    made: ClassVar[list[Cores]] = []
    looks = 0

    def __init__(self, most):
        super().__init__(most)
        self.made.append(self)

    def adapt(self):
        self.looks += 1
        super().adapt()


@pytest.mark.parametrize(
    ("settings", "adapts"), [({}, True), ({"deterministic": True}, False), ({"threads": 1}, False)], ids=str
)
def test_fixed_bits_and_a_number_that_the_user_names_stay(monkeypatch, settings, adapts):
    """The number of threads decides how a matrix product is summed, so deterministic mode must not change it."""
    monkeypatch.setattr("app.engine.runner.Cores", Counted)
    monkeypatch.setattr(Counted, "made", [])
    bench = Bench(FakePool(FakeFamily(card())), **settings).run([request("a")])
    assert len(bench.results) == 1
    works = len(bench.of(Tick))
    assert [each.looks for each in Counted.made] == ([works] if adapts else []), (
        "before each encode, forward and decode"
    )
