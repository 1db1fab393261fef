"""Need: what rows wait for, as the engine tells the pool.

Knows nothing of weights or memory, so that who chooses the needs need not either.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.report import Phase


@dataclass(frozen=True, slots=True)
class Need:
    """Parts of a model that rows wait for. urgent: these rows hold memory already, so nothing unleased is spared."""

    model: str
    phases: tuple[Phase, ...]
    urgent: bool = False
