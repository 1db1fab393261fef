"""The engine inside a command's own process."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from app.api.schemas import read_body
from app.cli.bodies import open_registry
from app.cli.local import Local
from app.report import Report, Result
from app.settings import Settings


def test_the_engine_computes_with_all_threads_of_the_plan(tiny: Path) -> None:
    """The loader's thread keeps itself to one, which torch hands on to every thread that starts after it."""
    settings = Settings(models=tiny, threads=3)
    registry = open_registry(settings)
    seen: list[int] = []

    def listen(report: Report) -> None:
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Local(settings, registry.cards, listen=listen) as local:
            torch.set_num_threads(1)  # as the loader does
            local.submit(read_body({"prompt": "a"}).to_request(registry.cards["tiny-sd3"], "id"))
            next(report for report in local.reports() if isinstance(report, Result))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {3}, os.cpu_count()
