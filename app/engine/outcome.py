"""Outcome: what a work came to, and the search for the row that makes a phase fail.

Knows nothing of what the phases compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from app.engine.row import Row
from app.errors import EngineError, InstepError, OutOfMemory


@dataclass(frozen=True, slots=True)
class Image:
    """A decoded row. pixels: uint8 [H, W, 3]; latents: float32 [C, h, w], when the request keeps them."""

    row: Row
    pixels: np.ndarray
    latents: np.ndarray | None


@dataclass(slots=True)
class Outcome:
    """Images that are done, rows that failed alone, padding passes, and how many forwards ran out of memory.

    idle: the parts left the device between the choice of the work and its start, so that nothing was done.
    text_hits, text_misses: texts that each encoder had encoded before, or now.
    """

    images: list[Image] = field(default_factory=list)
    failed: list[tuple[Row, InstepError]] = field(default_factory=list)
    padding: int = 0
    out_of_memory: int = 0
    text_hits: int = 0
    text_misses: int = 0
    idle: bool = False


ALONE = "this image alone does not fit in the device's memory"

Compute = Callable[[list[Row], Outcome], None]
"""What one phase does for rows."""


def isolate(phase: Compute, rows: list[Row], outcome: Outcome) -> None:
    """Run a phase; when it raises, halve the rows and run each half again, until one row fails alone.

    This is also the split and retry of a step that is out of memory. Phases change nothing before they succeed.
    """
    if not rows:
        return
    error = _attempt(phase, rows, outcome)
    if error is None:
        return
    outcome.out_of_memory += isinstance(error, OutOfMemory)
    if len(rows) == 1:
        outcome.failed.append((rows[0], error))
        return
    middle = len(rows) // 2
    isolate(phase, rows[:middle], outcome)
    isolate(phase, rows[middle:], outcome)


def _attempt(phase: Compute, rows: list[Row], outcome: Outcome) -> InstepError | None:
    """The error of a phase, or None. Nothing of the exception outlives this call: its traceback holds tensors."""
    try:
        phase(rows, outcome)
    except torch.AcceleratorError:
        raise
    except torch.OutOfMemoryError:
        return OutOfMemory(ALONE)
    except InstepError as error:
        return type(error)(error.message, param=error.param, retry_after=error.retry_after)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # a poison row must not take its neighbours with it; tokenizers panic as BaseException
        return EngineError(f"{type(error).__name__} in {phase.__name__.strip('_')}")
    return None
