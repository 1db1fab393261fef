"""How near two results are: the one home of bounds on rounding.

`close` compares results that must be equal but for rounding, `apart` a result and what a real fault makes of it. Both
take the same bound: what is close is within it, what is apart is ten times further away. A bound is at least ten times
what rounding makes on any processor. `python -m tests.bench.bounds` shows how far that is true: with BOUNDS in the
environment, the name of a file, every comparison appends a line to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

HEADROOM = 10
SAME = 1e-4
"""What the README promises of float32 latents, relative."""
FORWARD = 2e-5
"""One forward of a network in float32 beside another order of the same sums."""
EXACT = 1e-10
"""Both sides in float64: what is left is no rounding of ours."""
LEVELS = 1e-2
"""Pixels beside an image of 0 to 255 that is not rounded yet, beyond the half that rounding takes."""
BFLOAT16 = 3e-2
"""Pixels of networks that compute in bfloat16, which keeps eight bits."""


def relative(found: Any, wanted: Any) -> float:
    """The 2-norm of the difference, as a share of the 2-norm of what is wanted."""
    ours, theirs = _double(found), _double(wanted)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def furthest(found: Any, wanted: Any) -> float:
    """The largest difference of one number, as a share of the largest number that is wanted."""
    ours, theirs = _double(found), _double(wanted)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def each(found: Any, wanted: Any) -> float:
    """The largest difference of one number, as a share of that number."""
    ours, theirs = _double(found), _double(wanted)
    return float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-300)).max())


def beyond_rounding(found: Any, wanted: Any) -> float:
    """How far pixels, in levels, are from those of an image of 0 to 255, less the half that rounding may take."""
    return max(float(np.abs(_double(found) - _double(wanted)).max()) - 0.5, 0.0)


def close(found: Any, wanted: Any, bound: float, by: Callable[[Any, Any], float] = relative, of: Any = "") -> None:
    """Assert that two results of one shape are within the bound. by: the measure. of: what the message names."""
    seen = _seen("close", found, wanted, bound, by)
    assert seen <= bound, f"{of} {seen:.3g} away, more than {bound:g}"


def apart(found: Any, wanted: Any, bound: float, by: Callable[[Any, Any], float] = relative, of: Any = "") -> None:
    """Assert that two results are ten times as far from each other as what is close may be."""
    seen = _seen("apart", found, wanted, bound, by)
    assert seen >= HEADROOM * bound, f"{of} {seen:.3g} away, less than ten times {bound:g}"


def _seen(kind: str, found: Any, wanted: Any, bound: float, by: Callable[[Any, Any], float]) -> float:
    assert np.shape(found) == np.shape(wanted), f"{np.shape(found)} and {np.shape(wanted)}"
    seen = by(found, wanted)
    if file := os.environ.get("BOUNDS"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"test": test, "kind": kind, "bound": bound, "seen": seen}) + "\n")
    return seen


def _double(value: Any) -> np.ndarray:
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float64)
