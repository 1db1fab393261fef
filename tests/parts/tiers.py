"""Cases of parametrised tests in two tiers: a few for `make test`, all others for `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def tiers(cases: Iterable[Any], quick: Callable[..., object]) -> list[Any]:
    """The cases, of which those that are not quick are slow; a case is a tuple of the arguments."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]
