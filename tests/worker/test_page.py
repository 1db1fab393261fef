"""The page: what an engine process writes there is read by another, also when it died in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from app.report import Place
from app.worker.wire import Page

PLACES: list[Place] = [("r1", 0, -1), ("ünï 🍎", 3, 7)]
MANY: list[Place] = [(f"a name that is long: {number:060}", 0, 1) for number in range(2000)]
"""More than a half has room for."""


@pytest.fixture
def page() -> Iterator[Page]:
    made = Page()
    yield made
    made.close()


def test_a_new_page_is_empty(page: Page) -> None:
    assert page.read() == ([], set())


def test_both_halves_are_read_and_neither_disturbs_the_other(page: Page) -> None:
    page.computes(PLACES)
    assert page.read() == (PLACES, set())
    page.loads("a")
    assert page.read() == (PLACES, {"a"})
    page.computes([], "b")
    assert page.read() == ([], {"a", "b"})
    page.loads("")
    assert page.read() == ([], {"b"})
    page.computes([])
    assert page.read() == ([], set())


def test_the_last_that_was_written_counts_whatever_its_length(page: Page) -> None:
    for places in (PLACES, MANY[:800], PLACES[:1], MANY[:800], []):
        page.computes(places)
        assert page.read() == (places, set())


def test_what_is_too_long_counts_as_empty_and_spoils_nothing(page: Page) -> None:
    page.loads("a")
    page.computes(PLACES)
    page.computes(MANY)
    assert page.read() == ([], {"a"})
    page.computes(PLACES)
    page.loads("b" * 1_000_000)
    assert page.read() == (PLACES, set())


def test_a_forward_of_more_rows_than_any_batch_has_room(page: Page) -> None:
    """Ids are 36 characters long."""
    places = [(f"{number:036}", 9, 999) for number in range(1024)]
    page.computes(places)
    assert page.read() == (places, set())


@pytest.mark.parametrize("half", ["computes", "loads"])
def test_a_half_that_was_being_written_counts_as_empty(page: Page, half: str) -> None:
    """Killed between two writes of the same call, at each of them: the half has the old, the new, or nothing."""
    new = {"computes": (MANY[:3], ""), "loads": ("new",)}[half]
    seen = set()
    for writes in range(4):
        page.computes(PLACES)
        page.loads("old")
        kill_after(page, writes, f"page.{half}(*{new!r})")
        places, models = page.read()
        if half == "computes":
            assert models == {"old"}
            seen.add("new" if places == MANY[:3] else "old" if places == PLACES else str(places))
        else:
            assert places == PLACES
            seen.add("new" if models == {"new"} else "old" if models == {"old"} else str(models))
    assert seen == {"old", "new", "[]" if half == "computes" else "set()"}


KILLED = """
import os, signal, sys
from app.worker.wire import Page
page, left = Page(int(sys.argv[1])), int(sys.argv[2])

class Memory:
    def __init__(self, memory):
        self.memory = memory
    def __setitem__(self, place, data):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        self.memory[place] = data

page._memory = Memory(page._memory)
"""


def kill_after(page: Page, writes: int, call: str) -> None:
    """Make this call in a process that is killed after so many writes into the memory, or at the end."""
    code = f"{KILLED}\n{call}\nos.kill(os.getpid(), signal.SIGKILL)"
    words = [sys.executable, "-c", code, str(page.descriptor), str(writes)]
    done = subprocess.run(words, pass_fds=(page.descriptor,), timeout=60, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_page_is_gone_when_both_have_closed_it() -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = Page()
    other = Page(os.dup(made.descriptor))
    other.computes(PLACES)
    other.close()
    assert made.read() == (PLACES, set())
    made.close()
    assert len(os.listdir("/proc/self/fd")) == before
