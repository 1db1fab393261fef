"""The engine inside a command's own process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from app.cards.card import Card
from app.cards.folder import Part
from app.cli.options import open_registry
from app.jobs.body import read_body
from app.jobs.job import Job
from app.pool import builder
from app.report import Report
from app.settings import Settings
from app.worker.process import Local


def test_the_engine_computes_with_all_threads_of_the_plan_and_the_loader_with_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch hands what one thread asks for on to every thread that has not computed yet."""
    loading: list[int] = []
    read = builder.read_parts

    def seen_loading(card: Card, cards: Mapping[str, Card]) -> list[Part]:
        loading.append(torch.get_num_threads())
        return read(card, cards)

    monkeypatch.setattr(builder, "read_parts", seen_loading)
    settings = Settings(models=tiny, threads=3)
    registry = open_registry(settings)
    seen: list[int] = []

    def observe(report: Report) -> None:
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Local(settings, registry.cards, observe=observe) as local:
            torch.set_num_threads(4)  # of whoever computes next for the first time
            body, card = read_body({"prompt": "a"}), registry.cards["tiny-sd3"]
            local.submit(Job(body.to_request(card, "id"), card, body)).future.result()
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {3} and set(loading) == {1}
