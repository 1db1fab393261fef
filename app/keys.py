"""Keys: who may ask, and what each may have: an API key by its digest, its share of the device, its limits.

Knows nothing of HTTP headers (`app/api/security.py`); a key itself is never kept, only its SHA-256.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One client. name: its tenant in requests, metrics and logs. digest: SHA-256 of the key.

    weight: its share of the device beside the others'. priority: the highest that its requests may name.
    models: ids that it may use, empty for all. queue: most of its own device seconds that may wait, None for its share.
    """

    name: str
    digest: bytes = b""
    weight: float = 1.0
    priority: int = 10
    models: frozenset[str] = frozenset()
    queue: float | None = None


NOBODY = ApiKey("")
"""Every client of a server that was given no keys."""
