"""The fault table: every fault of the files of this folder, in their order."""

from __future__ import annotations

from importlib import import_module

from tests.faults.harness import FAULTS

__all__ = ["FAULTS", "FILES"]

FILES = ("kills", "rows", "ends")
"""Modules of this folder. Importing one puts its faults into the table."""

for file in FILES:
    import_module(f"tests.faults.{file}")
