"""Tiny models, and the command line on them as a user calls it."""

from __future__ import annotations

from tests.cli.conftest import cache, run, tiny

__all__ = ["cache", "run", "tiny"]
