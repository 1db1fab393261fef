"""Budget: what of the machine this process may take: bytes of a device and of its memory, and threads.

Cores: how many CPU threads a forward uses beside other processes.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from app.errors import SettingsError
from app.settings import Settings

_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kmgt]?i?b?)\s*", re.IGNORECASE)
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_STAT = Path("/proc/stat")

LOOK = 0.2
"""Seconds between two looks at the other processes, and the span that a look is about."""

SLACK = 0.4
"""Cores that others may use in all before a thread is given up: below this, all threads are still faster."""


def parse_bytes(text: str, total: int | None, name: str) -> int:
    """Bytes of a setting: "40GB", "512MiB", or a share of `total`, "80%", unless that is None. Raises SettingsError."""
    found = _AMOUNT.fullmatch(text)
    number, unit = (float(found[1]), found[2].lower()) if found else (0.0, "")
    if not found or (unit == "%" and total is None):
        forms = 'is not bytes ("256MB")' if total is None else 'is neither bytes ("40GB") nor a share ("80%")'
        raise SettingsError(f'INSTEP_{name.upper()}: "{text}" {forms}', param=name)
    if unit == "%" and total is not None:
        if number > 100:
            raise SettingsError(f"INSTEP_{name.upper()}: {text} is over 100 %", param=name)
        return int(total * number / 100)
    power = " kmgt".index(unit[0]) if unit and unit[0] != "b" else 0
    return int(number * (1024 if "i" in unit else 1000) ** power)


def host_bytes(cgroup: Path = _CGROUP) -> int:
    """All bytes of memory of this machine, or of the container that we are in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(cgroup.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no cgroup, or "max"
        return physical


def budgets(settings: Settings, device: str, devices: Sequence[str]) -> tuple[int, int]:
    """Bytes that weights may take of this device, and of host memory besides. Raises SettingsError.

    devices: of every engine process; they share the host's memory, and a device that is named twice.
    """
    total = host = host_bytes() // len(devices)
    if device.startswith("cuda"):
        own, *others = (torch.device(one).index or 0 for one in (device, *devices) if one.startswith("cuda"))
        sharers = others.count(own)
        total = torch.cuda.get_device_properties(device).total_memory // sharers
    return (
        parse_bytes(settings.device_memory, total, "device_memory"),
        parse_bytes(settings.host_memory, host, "host_memory"),
    )


def use_threads(count: int) -> None:
    """Let the calling thread compute with so many threads, whatever other threads ask for before or after.

    NOTE: a thread takes the number that was set last anywhere in the process when it first computes or asks for it,
    hence the question here. With more threads than cores in all, an engine drew at half its speed: OpenMP lets each
    thread fall asleep after every parallel region.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()


def processor() -> str:
    """The model name of this CPU; "cpu" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


class Cores:
    """Keeps the calling thread's number of torch threads at what other processes leave free.

    OpenMP's threads spin where they wait for each other. If one shares its core with another process, all spin until it
    has had its turn: on 2 cores an image took 4 times as long beside one busy process, and 1.3 times with one thread
    less (`python -m tests.bench.neighbours`). Processes with a niceness above 0 give way by themselves, and do not
    count while this one has none.

    most: the threads where nobody else computes. clock: seconds. used: processor seconds of this process.
    """

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
        stat: Path = _STAT,
    ) -> None:
        self.threads = self._most = most
        self._clock, self._used, self._stat = clock, used, stat
        self._last = self._look()

    def adapt(self) -> None:
        """Look at the other processes, if the last look is long enough ago, and set the number of threads."""
        if self._last is None or self._clock() - self._last[0] < LOOK:
            return
        before, self._last = self._last, self._look()
        if self._last is None:
            return
        seconds, all_used, own = (now - then for now, then in zip(self._last, before, strict=True))
        others = (all_used - own) / seconds
        free = len(os.sched_getaffinity(0)) - max(0, math.ceil(others - SLACK))
        threads = max(1, min(self._most, free))
        if threads != self.threads:
            self.threads = threads
            use_threads(threads)

    def _look(self) -> tuple[float, float, float] | None:
        """Seconds on the clock, of all processes on our cores, and of this one; None where the system does not say."""
        try:
            lines = self._stat.read_text().splitlines()
            ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            niced = os.nice(0) > 0
            busy = sum(_ticks(line, niced) for line in lines if line.partition(" ")[0] in ours)
            return self._clock(), busy / os.sysconf("SC_CLK_TCK"), self._used()
        except (OSError, AttributeError, ValueError, IndexError):
            return None


def _ticks(line: str, niced: bool) -> int:
    """The busy time of a core in a line of /proc/stat, with what the hypervisor gave to others.

    niced: count processes with a niceness above 0 too.
    """
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return user + system + irq + softirq + steal + (nice if niced else 0)
