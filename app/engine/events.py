"""Events: how long forwards take on a GPU, by the device's own clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from app.request import Key


class Events:
    """A pair of CUDA events around each forward, read when the device has passed both: nothing waits for them."""

    def __init__(self) -> None:
        self._open: deque[tuple[Key, int, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def around(self, key: Key, passes: int) -> Iterator[None]:
        """Time what is launched inside; a forward that raises is left out."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._open.append((key, passes, start, end))

    def finished(self) -> list[tuple[Key, int, float]]:
        """Key, passes and seconds of the forwards that have ended since the last call, oldest first."""
        found = []
        while self._open and self._open[0][-1].query():  # type: ignore[no-untyped-call]
            key, passes, start, end = self._open.popleft()
            found.append((key, passes, start.elapsed_time(end) / 1000))
        return found
